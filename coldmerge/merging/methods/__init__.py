"""One file for each merge method or family of them; `coldmerge.merging.registry` finds them."""
