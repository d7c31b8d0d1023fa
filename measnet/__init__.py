"""MEASNet, the network: for anyone with torch; imports nothing of the other rooms."""
