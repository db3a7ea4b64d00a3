"""The processes behind the API: their loop, their handlers, and the supervisor that starts them."""
