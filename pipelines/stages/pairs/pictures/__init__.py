"""From the bytes of any picture to the bytes that are stored."""
