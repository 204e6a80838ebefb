"""Pure functions from a problem and a device to a frozen kernel configuration, and the legality checks beside them."""
