"""Decoding by a routed pair: policies, one generator, and the backends it runs on."""
