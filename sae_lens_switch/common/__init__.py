"""What every other room may use; imports none of them."""
