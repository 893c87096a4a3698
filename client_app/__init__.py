"""The ClientApp: message in, local epochs, reply out."""
