"""Credit functions, one file each: a number for every token of a completion."""
