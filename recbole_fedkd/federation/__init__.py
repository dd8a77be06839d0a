"""A federation, put together: parties one by one, or all of them in one process."""
