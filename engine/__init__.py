"""A request's life: the books, the two threads that drive them, the executors they push to, the library face."""
