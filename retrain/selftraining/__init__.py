"""Self-training: a teacher labels boxes or masks, a student learns from both."""
