"""The configured model, and the embedded one, which a Python wheel brings."""
