"""Images: what `--data` names, decoding, loading, packs, crops, and the embedded data set."""
