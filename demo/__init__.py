"""A page in the browser to try a running server with. A client of its HTTP interface, nothing more."""
