"""MEASNet, the network: needs torch only; imports none of the other packages."""
