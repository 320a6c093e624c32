"""One op, one contract, several bodies. Here: bilinear triplane sampling."""
