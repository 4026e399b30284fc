"""The C++ ops: vectors, small products, and the compiler that makes one library of the .cpp files of `moxe.ops`."""
