"""Messages at rest: encoded, searched, measured and shown."""
