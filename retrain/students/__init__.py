"""Students in use: what they say of images, and the formats in which they leave."""
