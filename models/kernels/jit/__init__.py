"""The Triton programs themselves, which nothing imports before it launches one.

A program sees tensors as rows with the elements of a row side by side; ``*_stride`` is the distance of two rows. Row
numbers become 64 bits wide before anything is multiplied by them, since a batch's logits have more than 2^31 elements.
Arithmetic is fp32. An argument that is None is none of the compiled kernel. No kernel is compiled again for another
number of rows.
"""
