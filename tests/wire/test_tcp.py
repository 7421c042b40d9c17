"""What only the socket listener can get wrong."""
