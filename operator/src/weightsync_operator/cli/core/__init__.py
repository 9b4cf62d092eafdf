"""What the command line shows and decides, without a network, a clock or a terminal."""
