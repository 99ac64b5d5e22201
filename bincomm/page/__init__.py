"""What the pages that bincomm writes are made of: HTML that needs no other file, for any width of screen."""
