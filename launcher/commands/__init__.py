"""The commands of the zerofit program: parse, call, print."""
