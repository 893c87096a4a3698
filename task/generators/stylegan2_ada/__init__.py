"""StyleGAN2 with adaptive discriminator augmentation, class-conditional.

The networks, what is done to the images that the discriminator sees, and the generator that trains
both. Written from the papers (arXiv 1912.04958, 2006.06676).
"""
