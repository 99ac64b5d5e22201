#pragma once

namespace bincomm {

// See the Python docstring in bindings.cpp.
int largest_side(int device);

}  // namespace bincomm
