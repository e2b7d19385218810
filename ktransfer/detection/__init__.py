"""Boxes and masks: data, canvases, trunks, detectors and what they reach."""
