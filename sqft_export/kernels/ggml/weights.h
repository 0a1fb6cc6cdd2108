/* Convert weights between the blocks of GGUF files and the packed format of our kernels. */
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

extern "C" {
#include "../matrix.h"
}

namespace sqft {

/* automatic: leave out zeros where that saves memory and costs no time. */
enum class Form { automatic, dense, sparse };

struct PackOptions {
  Form form;
  size_t group;   /* activations are rounded in groups of at most this many inputs */
  uint32_t lanes; /* of the kernels */
};

/* Pack a weight of type Q4_0, Q4_1 or Q8_0. Return null if memory is exhausted, or if the minimum
   of a Q4_1 block is not a multiple of its scale from -15 to 0. */
std::shared_ptr<SqftMatrix> pack_blocks(const uint8_t *blocks, int type, size_t rows,
                                        size_t inputs, const PackOptions &options);
/* Write the blocks of a packed weight. */
void unpack_blocks(const SqftMatrix *m, int type, uint8_t *blocks);

}  // namespace sqft
