"""What image files hold beside sound pixels: how it is passed over, and how it is said."""
