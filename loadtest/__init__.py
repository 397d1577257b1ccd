"""Load tests and side-by-side measurements. Knows the product by HTTP and files only."""
