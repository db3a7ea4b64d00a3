"""The other sides of a benchmark, one file per peer; each loads its library only when it runs."""
