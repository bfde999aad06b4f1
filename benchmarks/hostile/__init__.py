"""`make hostile`: attacks, and honest clients beside them."""
