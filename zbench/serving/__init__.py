"""What the engine `endpoint` needs of the world outside: an HTTP client, a server's counters, a server's process."""
