#include "weights.h"

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "abi.h"

namespace sqft {
namespace {

constexpr size_t kHugePage = size_t(2) << 20, kPiece = 32 * kHugePage, kBlock = 32;
constexpr double kSparseShare = 0.62; /* with fewer codes kept, leaving out zeros saves memory */

/* Allocate memory in huge pages. Matrices share pieces; a piece lives as long as one of them. */
std::shared_ptr<uint8_t> allocate(size_t size) {
  static std::mutex mutex;
  static std::weak_ptr<uint8_t> newest;
  static size_t used = 0, whole = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<uint8_t> piece = newest.lock();
  if (!piece || size > whole - used) {
    const size_t wanted = std::max(kPiece, (size + kHugePage - 1) / kHugePage * kHugePage);
    void *memory = nullptr;
    if (posix_memalign(&memory, kHugePage, wanted)) return nullptr;
    madvise(memory, wanted, MADV_HUGEPAGE);
    piece.reset(static_cast<uint8_t *>(memory), [](uint8_t *p) { free(p); });
    newest = piece, whole = wanted, used = 0;
  }
  std::shared_ptr<uint8_t> part(piece, piece.get() + used);
  used = std::min(whole, (used + size + 63) / 64 * 64);
  return part;
}

/* Call work(first, last) for parts of 0..count, on all allowed processors. */
template <typename Work>
void in_parts(size_t count, const Work &work) {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  size_t threads = sched_getaffinity(0, sizeof allowed, &allowed) ? 1 : size_t(CPU_COUNT(&allowed));
  threads = std::max<size_t>(1, std::min<size_t>(threads, count));
  std::vector<std::thread> pool;
  for (size_t i = 1; i < threads; i++) {
    const size_t first = count * i / threads, last = count * (i + 1) / threads;
    try {
      pool.emplace_back([&work, first, last] { work(first, last); });
    } catch (const std::system_error &) { /* no more threads are allowed */
      work(first, last);
    }
  }
  work(size_t(0), count / threads);
  for (auto &thread : pool) thread.join();
}

float to_float(uint16_t half) {
  const uint32_t exponent = half >> 10 & 31, fraction = half & 1023;
  const float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                      : exponent == 0 ? ldexpf(float(fraction), -24)
                                      : ldexpf(float(1024 + fraction), int(exponent) - 25);
  return half >> 15 ? -value : value;
}

/* Round to float16, to nearest even. The value is a product that float16 represents exactly. */
uint16_t to_half(float value) {
  if (value == 0 || std::isnan(value)) return value == 0 ? 0 : 0x7e00;
  int exponent;
  const float fraction = frexpf(fabsf(value), &exponent); /* 0.5 <= fraction < 1 */
  const uint16_t sign = value < 0 ? 0x8000 : 0;
  if (exponent > 16) return sign | 0x7c00;
  if (exponent < -13) return sign | uint16_t(lrintf(ldexpf(fabsf(value), 24)));
  return uint16_t(sign | uint16_t((exponent + 13) * 1024 + lrintf(ldexpf(fraction, 11))));
}

struct BlockFormat {
  uint32_t bits;
  size_t head, bytes; /* bytes of scale and minimum; of the block */
};

BlockFormat format_of(int type) {
  if (type == ggml_abi::Q8_0) return {8, 2, 34};
  return type == ggml_abi::Q4_1 ? BlockFormat{4, 4, 20} : BlockFormat{4, 2, 18};
}

/* Codes, scales and zero points, row major. INT4: two codes per byte. zero: empty if symmetric. */
struct Codes {
  uint32_t bits, flip, group;
  std::vector<uint8_t> codes, zero;
  std::vector<uint16_t> scale;
  const uint8_t *zeros() const { return zero.empty() ? nullptr : zero.data(); }
};

/* Return how many adjacent blocks repeat their scale everywhere: 1, 2 or 4. */
size_t count_repeats(const uint8_t *blocks, const BlockFormat &f, size_t count, size_t per_row,
                     size_t limit) {
  size_t repeats = limit;
  while (repeats > 1 && per_row % repeats) repeats /= 2;
  for (size_t i = 0; i < count && repeats > 1; i++)
    while (repeats > 1 &&
           memcmp(blocks + i * f.bytes, blocks + i / repeats * repeats * f.bytes, f.head))
      repeats /= 2;
  return repeats;
}

/* Return z with minimum = -scale * z, or 16 if no code of 4 bits is one. */
uint8_t zero_point(const uint8_t *block) {
  uint16_t scale, minimum;
  memcpy(&scale, block, 2), memcpy(&minimum, block + 2, 2);
  const float s = to_float(scale), m = to_float(minimum);
  const float zero = s == 0 ? 0 : rintf(-m / s);
  return zero >= 0 && zero < 16 && -s * zero == m ? uint8_t(zero) : 16;
}

/* A block has code j and code j + 16 in one byte; packing wants code j and code j + 1. */
void copy_codes(const uint8_t *in, uint32_t bits, uint8_t *out) {
  if (bits == 8) {
    memcpy(out, in, kBlock);
    return;
  }
  for (size_t j = 0; j < 16; j += 2) {
    out[j / 2] = uint8_t((in[j] & 15) | in[j + 1] << 4);
    out[8 + j / 2] = uint8_t(in[j] >> 4 | (in[j + 1] & 240));
  }
}

/* Read all blocks. Returns false if a zero point is not a code. */
bool read_blocks(const uint8_t *blocks, int type, size_t rows, size_t inputs, size_t group,
                 Codes &c) {
  const BlockFormat f = format_of(type);
  const size_t per_row = inputs / kBlock;
  const size_t repeats = count_repeats(blocks, f, rows * per_row, per_row, group / kBlock);
  c.bits = f.bits;
  c.flip = f.bits == 8 ? 128 : 0;
  c.group = uint32_t(repeats * kBlock);
  c.codes.resize(rows * inputs * f.bits / 8);
  c.scale.resize(rows * per_row / repeats);
  c.zero.resize(type == ggml_abi::Q4_1 ? c.scale.size() : 0);
  std::atomic<bool> fits{true};
  in_parts(rows, [&](size_t first, size_t last) {
    for (size_t i = first * per_row; i < last * per_row; i++) {
      const uint8_t *block = blocks + i * f.bytes;
      copy_codes(block + f.head, f.bits, c.codes.data() + i * kBlock * f.bits / 8);
      if (i % repeats) continue;
      memcpy(&c.scale[i / repeats], block, 2);
      if (c.zero.empty()) continue;
      c.zero[i / repeats] = zero_point(block);
      if (c.zero[i / repeats] > 15) fits = false;
    }
  });
  return fits;
}

/* Choose the format: dense, any mask, or 2:4. */
uint32_t choose_format(const std::vector<uint32_t> &kept, bool pairs, double weights,
                       const PackOptions &options) {
  double all = 0;
  for (uint32_t k : kept) all += k;
  /* Only AVX-512, with 16 lanes, expands any mask as fast as memory is read. */
  const bool pays = all <= kSparseShare * weights && (pairs || options.lanes == 16);
  if (options.form == Form::dense || (options.form == Form::automatic && !pays)) return SQFT_DENSE;
  return pairs ? SQFT_PAIRS : SQFT_MASK;
}

}  // namespace

std::shared_ptr<SqftMatrix> pack_blocks(const uint8_t *blocks, int type, size_t rows,
                                        size_t inputs, const PackOptions &options) {
  Codes c;
  if (!read_blocks(blocks, type, rows, inputs, options.group, c)) return nullptr;
  std::vector<uint32_t> kept(rows);
  std::atomic<bool> pairs{true};
  in_parts(rows, [&](size_t first, size_t last) {
    const uint8_t *zero = c.zeros() ? c.zeros() + first * (inputs / c.group) : nullptr;
    if (!sqft_count(c.codes.data() + first * inputs * c.bits / 8, c.bits, c.flip, zero,
                    uint32_t(last - first), uint32_t(inputs), c.group, kept.data() + first))
      pairs = false;
  });
  SqftMatrix plan{};
  plan.bits = c.bits, plan.lanes = options.lanes, plan.asymmetric = !c.zero.empty();
  plan.rows = uint32_t(rows), plan.inputs = uint32_t(inputs), plan.stored_group = c.group;
  plan.format = choose_format(kept, pairs, double(rows) * double(inputs), options);
  if (sqft_plan(&plan, kept.data())) return nullptr;
  const auto memory = allocate(plan.bytes);
  if (!memory) return nullptr;
  memcpy(memory.get(), &plan, sizeof plan);
  std::shared_ptr<SqftMatrix> m(memory, reinterpret_cast<SqftMatrix *>(memory.get()));
  sqft_place(m.get(), kept.data());
  in_parts(m->tiles, [&](size_t first, size_t last) {
    sqft_pack(m.get(), c.codes.data(), c.flip, c.zeros(), c.scale.data(), first, last);
  });
  sqft_seal(m.get());
  return m;
}

void unpack_blocks(const SqftMatrix *m, int type, uint8_t *blocks) {
  const BlockFormat f = format_of(type);
  const size_t groups = size_t(m->rows) * (m->inputs / m->stored_group);
  std::vector<uint8_t> codes(size_t(m->rows) * m->inputs), zero(groups);
  std::vector<uint16_t> scale(groups);
  sqft_unpack(m, codes.data(), zero.data(), scale.data());
  for (size_t i = 0; i < codes.size() / kBlock; i++, blocks += f.bytes) {
    const size_t group = i * kBlock / m->stored_group;
    const uint8_t *in = codes.data() + i * kBlock;
    memcpy(blocks, &scale[group], 2);
    const uint16_t minimum = to_half(-to_float(scale[group]) * zero[group]);
    if (f.head == 4) memcpy(blocks + 2, &minimum, 2);
    uint8_t *out = blocks + f.head;
    for (size_t j = 0; j < f.bytes - f.head; j++)
      out[j] = uint8_t(f.bits == 8 ? in[j] ^ 128 : in[j] | in[j + 16] << 4);
  }
}

}  // namespace sqft
