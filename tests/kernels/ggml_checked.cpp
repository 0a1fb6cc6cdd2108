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

int main() {
  if (!ggml_backend_init()) return 2;
  std::mt19937 random(1);
  int products = 0;
  for (int type : {2, 3, 8})
    for (int64_t rows : {1, 16, 33})
      for (int64_t inputs : {32, 160, 256})
        for (int64_t tokens : {1, 3, 130})
          for (int parts : {1, 2}) {
            const size_t bytes = type == 8 ? 34 : type == 3 ? 20 : 18;
            std::vector<uint8_t> blocks(size_t(rows * inputs) / 32 * bytes), stored(blocks.size());
            for (size_t i = 0; i < blocks.size(); i++) blocks[i] = uint8_t(random());
            for (size_t i = 0; i < blocks.size(); i += bytes) {
              blocks[i] = 0, blocks[i + 1] = 0x3c; /* scale 1 */
              if (type == 3) blocks[i + 2] = 0, blocks[i + 3] = 0xc8; /* minimum -8 */
            }
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
  printf("%d products\n", products);
}
