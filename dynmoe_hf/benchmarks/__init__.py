"""Cases in which engines, peers and methods are compared side by side: equal first, then time or memory."""
