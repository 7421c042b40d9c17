"""Discovery: receivers announce themselves with multicast DNS, and both sides can look for them."""
