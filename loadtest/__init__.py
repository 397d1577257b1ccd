"""Load tests and side-by-side measurements, by HTTP, or offline with engines of their own."""
