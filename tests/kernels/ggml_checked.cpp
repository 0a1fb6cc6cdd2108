/* Products of random weights of many shapes, for a build with checkers of memory. */
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

extern "C" void *ggml_backend_init();
extern "C" int host_multiply(int type, const uint8_t *blocks, int64_t rows, int64_t inputs,
                             const float *x, int64_t tokens, int threads, int parts, float *y,
                             uint8_t *stored);

extern "C" int host_multiply_experts(int type, const uint8_t *blocks, int64_t rows, int64_t inputs,
                                     int64_t experts, const int32_t *ids, int64_t used,
                                     const float *x, int64_t tokens, int threads, int parts,
                                     float *y, uint8_t *stored);

namespace {

/* Blocks of random codes, all with the scale 1 (and the minimum -8 in Q4_1). */
std::vector<uint8_t> random_blocks(std::mt19937 &random, int type, int64_t count) {
  const size_t bytes = type == 8 ? 34 : type == 3 ? 20 : 18;
  std::vector<uint8_t> blocks(size_t(count) * bytes);
  for (size_t i = 0; i < blocks.size(); i++) blocks[i] = uint8_t(random());
  for (size_t i = 0; i < blocks.size(); i += bytes) {
    blocks[i] = 0, blocks[i + 1] = 0x3c;
    if (type == 3) blocks[i + 2] = 0, blocks[i + 3] = 0xc8;
  }
  return blocks;
}

int multiply_experts(std::mt19937 &random, int &products) {
  for (int type : {2, 3, 8})
    for (int64_t rows : {1, 33})
      for (int64_t tokens : {1, 3, 70}) {
        const int64_t inputs = 160, experts = 3, used = 2;
        const std::vector<uint8_t> blocks = random_blocks(random, type, experts * rows * inputs / 32);
        std::vector<uint8_t> stored(blocks.size());
        std::vector<float> x(size_t(inputs * tokens), 0.5f), y(size_t(rows * used * tokens), NAN);
        std::vector<int32_t> ids(size_t(used * tokens));
        for (int32_t &id : ids) id = int32_t(random() % uint32_t(experts));
        if (host_multiply_experts(type, blocks.data(), rows, inputs, experts, ids.data(), used,
                                  x.data(), tokens, 3, 1, y.data(), stored.data()))
          return 6;
        for (float value : y)
          if (!std::isfinite(value)) return 7;
        if (stored != blocks) return 8;
        products++;
      }
  return 0;
}

}  // namespace

int main() {
  if (!ggml_backend_init()) return 2;
  std::mt19937 random(1);
  int products = 0;
  for (int type : {2, 3, 8})
    for (int64_t rows : {1, 16, 33})
      for (int64_t inputs : {32, 160, 256})
        for (int64_t tokens : {1, 3, 130})
          for (int parts : {1, 2}) {
            const std::vector<uint8_t> blocks = random_blocks(random, type, rows * inputs / 32);
            std::vector<uint8_t> stored(blocks.size());
            std::vector<float> x(size_t(inputs * tokens)), y(size_t(rows * tokens), NAN);
            for (float &value : x) value = float(random() % 2000) / 1000 - 1;
            if (host_multiply(type, blocks.data(), rows, inputs, x.data(), tokens, 3, parts,
                              y.data(), stored.data()))
              return 3;
            for (float value : y)
              if (!std::isfinite(value)) return 4;
            if (stored != blocks) return 5;
            products++;
          }
  if (const int failed = multiply_experts(random, products)) return failed;
  printf("%d products\n", products);
}
