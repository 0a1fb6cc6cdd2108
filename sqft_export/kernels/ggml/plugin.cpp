/* A library for GGML_BACKEND_PATH or LD_PRELOAD. It gives ggml's CPU backend one more buffer type,
   the first of its list, which llama.cpp therefore tries first. Weights in such a buffer are packed
   for our kernels, and their products run on these kernels in ggml's own threads. */
#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "host.h"
#include "../mapped.h"
#include "weights.h"

namespace sqft {
namespace {

constexpr size_t kTokensPerPass = 128; /* their rounded activations stay in the L2 cache */
constexpr size_t kExpertTokens = 32;   /* tokens of an expert that are multiplied at once */
constexpr unsigned kTestSeconds = 20;

Host host;
const SqftKernels *kernels;
PackOptions options{Form::automatic, 32, 8};
std::atomic<bool> exact;
bool testing, usable; /* during, and after, test products that were right */
enum class Choice { ours, measured } choice; /* whether weights are left to llama.cpp for speed */
bool takes_experts = true; /* false after a test product of experts was wrong */
void *our_words[kTypeWords]; /* our buffer type; its layout is the host's */
BufferType *const our_type = reinterpret_cast<BufferType *>(our_words);
std::string why_not; /* why our kernels are not used */

size_t align(size_t n) { return (n + 63) / 64 * 64; }

void print_line(const char *format, ...) {
  char line[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  fprintf(stderr, "sqft: %s\n", line);
}

/* ---- products ---- */

/* Offsets of the parts of rounded activations in ggml's work memory. */
struct Workspace {
  size_t codes, scale, inputs, scratch;
  Workspace(const SqftMatrix *m, size_t tokens)
      : codes(align(sqft_code_bytes(m, tokens))),
        scale(align(tokens * m->groups * sizeof(float))),
        inputs(codes + 2 * scale),
        scratch(tokens > 1 ? align(kernels->scratch_bytes(m, tokens)) : 0) {}
  SqftInputs at(uint8_t *memory) const {
    return {reinterpret_cast<int8_t *>(memory), reinterpret_cast<float *>(memory + codes),
            reinterpret_cast<int32_t *>(memory + codes + scale)};
  }
};

size_t token_count(const Tensor *x) { return size_t(x->ne[1] * x->ne[2] * x->ne[3]); }

const float *token_at(const Tensor *x, size_t t) {
  const size_t i1 = t % size_t(x->ne[1]), i2 = t / size_t(x->ne[1]) % size_t(x->ne[2]),
               i3 = t / size_t(x->ne[1] * x->ne[2]);
  return reinterpret_cast<const float *>(static_cast<const char *>(x->data) + i1 * x->nb[1] +
                                         i2 * x->nb[2] + i3 * x->nb[3]);
}

/* Round token t of x, and multiply it with the rows of tiles first..last. */
void multiply_token(const SqftMatrix *m, const float *x, float *y, size_t first, size_t last,
                    uint8_t *memory) {
  SqftInputs in = Workspace(m, 1).at(memory);
  kernels->round(m, x, 0, 1, &in);
  kernels->one(m, &in, y, first, last);
}

size_t first_tile(const SqftMatrix *m, const ComputeParams *params) {
  return m->tiles * size_t(params->ith) / size_t(params->nth);
}
size_t last_tile(const SqftMatrix *m, const ComputeParams *params) {
  return m->tiles * size_t(params->ith + 1) / size_t(params->nth);
}

uint8_t *aligned(void *memory) {
  return reinterpret_cast<uint8_t *>(align(reinterpret_cast<uintptr_t>(memory)));
}

/* A product of one matrix. */
class Product {
 public:
  Product(const SqftMatrix *matrix, const ComputeParams *params, const Tensor *op)
      : m(matrix), params(params), x(op->src[1]), y(static_cast<float *>(op->data)),
        first(first_tile(matrix, params)), last(last_tile(matrix, params)) {}

  static size_t work_size(const SqftMatrix *m, size_t threads, size_t tokens) {
    if (tokens == 1) return 64 + threads * Workspace(m, 1).inputs;
    size_t size = 64 + threads * Workspace(m, std::min(tokens, kTokensPerPass)).scratch;
    for (size_t t = 0; t < tokens; t += kTokensPerPass)
      size += Workspace(m, std::min(tokens - t, kTokensPerPass)).inputs;
    return size;
  }

  void run() const {
    uint8_t *memory = aligned(params->wdata);
    if (exact.load(std::memory_order_relaxed))
      multiply_exact();
    else if (token_count(x) == 1)
      /* Each thread rounds for itself, which takes less time than waiting for another. */
      multiply_token(m, token_at(x, 0), y, first, last,
                     memory + size_t(params->ith) * Workspace(m, 1).inputs);
    else
      multiply_many(memory);
  }

 private:
  /* Activations in float32, as a reference. */
  void multiply_exact() const {
    const size_t row = size_t(x->ne[0]) * sizeof(float);
    const size_t adjacent = x->nb[1] == row ? size_t(x->ne[1]) : 1;
    for (size_t t = 0; t < token_count(x); t += adjacent)
      sqft_exact(m, token_at(x, t), adjacent, y + t * m->rows, first, last);
  }

  void multiply_many(uint8_t *memory) const {
    const size_t i = size_t(params->ith), n = size_t(params->nth), tokens = token_count(x);
    uint8_t *at = memory;
    for (size_t from = 0; from < tokens; from += kTokensPerPass) {
      const size_t count = std::min(tokens - from, kTokensPerPass);
      SqftInputs in = Workspace(m, count).at(at);
      for (size_t t = 0; t < count; t++)
        if ((from + t) % n == i) kernels->round(m, token_at(x, from + t), t, count, &in);
      at += Workspace(m, count).inputs;
    }
    uint8_t *scratch = at + i * Workspace(m, std::min(tokens, kTokensPerPass)).scratch;
    if (n > 1) host.barrier(params->threadpool);
    at = memory;
    for (size_t from = 0; from < tokens; from += kTokensPerPass) {
      const size_t count = std::min(tokens - from, kTokensPerPass);
      SqftInputs in = Workspace(m, count).at(at);
      float *out = y + from * m->rows;
      if (count == 1)
        kernels->one(m, &in, out, first, last);
      else
        kernels->many(m, &in, count, out, first, last, scratch);
      at += Workspace(m, count).inputs;
    }
  }

  const SqftMatrix *m;
  const ComputeParams *params;
  const Tensor *x;
  float *y;
  size_t first, last;
};

using Matrices = std::vector<std::shared_ptr<SqftMatrix>>;

/* A product in which every token has its own experts: y[:, k, t] = w[ids[k, t]] x[:, k or 0, t].
   A thread computes the same rows of all of them, so that it waits for no other one. */
class ExpertProduct {
 public:
  ExpertProduct(const Matrices &experts, const ComputeParams *params, const Tensor *op)
      : experts(experts), params(params), op(op), x(op->src[1]), ids(op->src[2]) {}

  static size_t work_size(const Matrices &experts, size_t threads) {
    return 64 + threads * part(experts) + align(kExpertTokens * experts[0]->rows * sizeof(float));
  }

  void run() const {
    for (size_t e = 0; e < experts.size(); e++) {
      const SqftMatrix *m = experts[e].get();
      size_t found[kExpertTokens], count = 0;
      for (size_t pair = 0; pair < pairs(); pair++) {
        if (expert_of(pair) == int32_t(e)) found[count++] = pair;
        if (count == kExpertTokens || (count && pair + 1 == pairs())) {
          multiply(m, found, count);
          count = 0;
        }
      }
    }
  }

 private:
  static size_t part(const Matrices &experts) {
    size_t size = 0; /* groups, and so sizes, may differ between experts */
    for (const auto &m : experts)
      size = std::max({size, Workspace(m.get(), 1).inputs,
                       Workspace(m.get(), kExpertTokens).inputs +
                           Workspace(m.get(), kExpertTokens).scratch});
    return align(size);
  }
  size_t used() const { return size_t(ids->ne[0]); }
  size_t pairs() const { return used() * size_t(ids->ne[1]); }
  int32_t expert_of(size_t pair) const {
    return *reinterpret_cast<const int32_t *>(static_cast<const char *>(ids->data) +
                                              pair % used() * ids->nb[0] +
                                              pair / used() * ids->nb[1]);
  }
  const float *input_of(size_t pair) const {
    const size_t k = pair % used() % size_t(x->ne[1]);
    return reinterpret_cast<const float *>(static_cast<const char *>(x->data) + k * x->nb[1] +
                                           pair / used() * x->nb[2]);
  }
  float *output_of(size_t pair) const {
    return reinterpret_cast<float *>(static_cast<char *>(op->data) + pair % used() * op->nb[1] +
                                     pair / used() * op->nb[2]);
  }

  void multiply(const SqftMatrix *m, const size_t *found, size_t count) const {
    const size_t first = first_tile(m, params), last = last_tile(m, params);
    uint8_t *shared = aligned(params->wdata);
    uint8_t *own = shared + align(kExpertTokens * m->rows * sizeof(float)) +
                   size_t(params->ith) * part_;
    if (exact.load(std::memory_order_relaxed)) {
      for (size_t t = 0; t < count; t++)
        sqft_exact(m, input_of(found[t]), 1, output_of(found[t]), first, last);
    } else if (count == 1) {
      multiply_token(m, input_of(found[0]), output_of(found[0]), first, last, own);
    } else {
      const Workspace space(m, count);
      SqftInputs in = space.at(own);
      for (size_t t = 0; t < count; t++) kernels->round(m, input_of(found[t]), t, count, &in);
      auto *y = reinterpret_cast<float *>(shared);
      kernels->many(m, &in, count, y, first, last, own + space.inputs);
      const size_t from = first * sqft_tile_rows(m);
      const size_t end = std::min<size_t>(last * sqft_tile_rows(m), m->rows);
      for (size_t t = 0; t < count && from < end; t++)
        memcpy(output_of(found[t]) + from, y + t * m->rows + from, (end - from) * sizeof(float));
    }
  }

  const Matrices &experts;
  const ComputeParams *params;
  const Tensor *op, *x, *ids;
  size_t part_ = part(experts);
};

/* A tensor in our buffer. Without matrices, its bytes are those of the file, in their place, and
   llama.cpp multiplies with them. */
class Weight : public Traits {
 public:
  Matrices matrices; /* one, or one for every expert */
  bool plain = false; /* counted as multiplied by llama.cpp */

  bool work_size(int threads, const Tensor *op, size_t &size) override {
    size = op->op == host.mul_mat_op
               ? Product::work_size(matrices[0].get(), size_t(threads), token_count(op->src[1]))
               : ExpertProduct::work_size(matrices, size_t(threads));
    return true;
  }

  bool compute_forward(ComputeParams *params, Tensor *op) override {
    if (op->op == host.mul_mat_op)
      Product(matrices[0].get(), params, op).run();
    else
      ExpertProduct(matrices, params, op).run();
    return true;
  }
};

/* ---- the line that counts tensors ---- */

/* Tensors of the model that was loaded last, by type. */
class Counts {
 public:
  void add_packed(int type, bool sparse) {
    if (!usable || paused_) return; /* products that are tests */
    const std::lock_guard<std::mutex> lock(mutex_);
    packed_[type]++, sparse_ += sparse, printed_ = false;
  }
  void add_other(int type) {
    const std::lock_guard<std::mutex> lock(mutex_);
    other_[type]++;
  }
  /* While paused, products and weights do not belong to a model. */
  void pause(bool paused) { paused_ = paused; }
  /* Print the counts once per model: at its first product, when all tensors are loaded. */
  void print_once() {
    if (paused_ || printed_.load(std::memory_order_relaxed) || printed_.exchange(true)) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t all = 0;
    for (const auto &entry : packed_) all += entry.second;
    print_line("%zu tensors on our kernels (%s; %zu sparse), others with llama.cpp: %s", all,
               names(packed_).c_str(), sparse_, names(other_).c_str());
    packed_.clear(), other_.clear(), sparse_ = 0;
  }
 private:
  static std::string names(const std::map<int, size_t> &counts) {
    std::string text;
    for (const auto &entry : counts)
      text += (text.empty() ? "" : ", ") + std::to_string(entry.second) + " " +
              host.type_name(entry.first);
    return text.empty() ? "none" : text;
  }
  std::mutex mutex_;
  std::map<int, size_t> packed_, other_;
  size_t sparse_ = 0;
  bool paused_ = false;
  std::atomic<bool> printed_{true};
} counts;

/* ---- the buffer ---- */

/* Address space without memory: the packed size is only known when a weight is there. */
struct Space {
  void *base;
  size_t size;
  std::vector<std::unique_ptr<Weight>> weights;
};

Space *space_of(Buffer *buffer) { return static_cast<Space *>(host.context_of(buffer)); }

Weight *weight_of(const Tensor *tensor) {
  return static_cast<Weight *>(static_cast<Traits *>(host.tensor_extra(tensor)));
}

void free_buffer(Buffer *buffer) {
  Space *space = space_of(buffer);
  munmap(space->base, space->size);
  delete space;
}

void *get_base(Buffer *buffer) { return space_of(buffer)->base; }

int init_tensor(Buffer *buffer, Tensor *tensor) {
  if (tensor->view_src) return 0;
  auto *weight = new Weight;
  space_of(buffer)->weights.emplace_back(weight);
  host.tensor_extra(tensor) = static_cast<Traits *>(weight);
  return 0;
}

/* Write the blocks of all matrices of a tensor. */
void unpack_all(const Weight *weight, const Tensor *tensor, uint8_t *blocks) {
  for (size_t e = 0; e < weight->matrices.size(); e++)
    unpack_blocks(weight->matrices[e].get(), tensor->type, blocks + e * tensor->nb[2]);
}

/* Give a tensor memory for the bytes of the file, and write them if it was packed. */
void make_plain(const Tensor *tensor) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(tensor->data), end = begin + host.nbytes(tensor);
  const uintptr_t first = begin / page * page;
  if (mprotect(reinterpret_cast<void *>(first), end - first, PROT_READ | PROT_WRITE)) {
    print_line("out of memory: a weight of %zu bytes", host.nbytes(tensor));
    abort(); /* as llama.cpp does; this function can't return an error */
  }
  Weight *weight = weight_of(tensor);
  if (!weight || weight->matrices.empty()) return;
  unpack_all(weight, tensor, static_cast<uint8_t *>(tensor->data));
  weight->matrices.clear();
}

/* Pack all matrices of a tensor; none if one of them can't be packed. */
Matrices try_to_pack(const Tensor *tensor, const void *data) {
  Matrices packed;
  try {
    const auto *blocks = static_cast<const uint8_t *>(data);
    for (size_t e = 0; e < size_t(tensor->ne[2]); e++) {
      packed.push_back(pack_blocks(blocks + e * tensor->nb[2], tensor->type, size_t(tensor->ne[1]),
                                   size_t(tensor->ne[0]), options));
      if (!packed.back()) return {};
    }
  } catch (const std::bad_alloc &) {
    return {};
  }
  return packed;
}

bool any_sparse(const Matrices &matrices) {
  return std::any_of(matrices.begin(), matrices.end(),
                     [](const auto &m) { return m->format != SQFT_DENSE; });
}

void set_tensor(Buffer *, Tensor *tensor, const void *data, size_t offset, size_t size) {
  Weight *weight = weight_of(tensor);
  const bool whole = offset == 0 && size == host.nbytes(tensor);
  if (weight && whole) weight->matrices = try_to_pack(tensor, data);
  if (weight && whole && !weight->matrices.empty()) {
    counts.add_packed(tensor->type, any_sparse(weight->matrices));
    drop_mapped_pages(data, size);
    return;
  }
  if (!weight || !weight->plain) counts.add_other(tensor->type);
  if (weight) weight->plain = true;
  make_plain(tensor);
  memcpy(static_cast<char *>(tensor->data) + offset, data, size);
}

void memset_tensor(Buffer *, Tensor *tensor, uint8_t value, size_t offset, size_t size) {
  make_plain(tensor);
  memset(static_cast<char *>(tensor->data) + offset, value, size);
}

void get_tensor(Buffer *, const Tensor *tensor, void *data, size_t offset, size_t size) {
  const Weight *weight = weight_of(tensor);
  std::vector<uint8_t> blocks;
  const char *from = static_cast<const char *>(tensor->data);
  if (weight && !weight->matrices.empty()) {
    blocks.resize(host.nbytes(tensor));
    unpack_all(weight, tensor, blocks.data());
    from = reinterpret_cast<const char *>(blocks.data());
  }
  memcpy(data, from + offset, size);
}

void clear_nothing(Buffer *, uint8_t) {} /* before tensors are set */

Buffer *alloc_buffer(BufferType *type, size_t size) {
  size = std::max<size_t>(size, 4096);
  void *base = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  Buffer *buffer = host.buffer_from_ptr(base, size);
  if (!buffer) {
    munmap(base, size);
    return nullptr;
  }
  *reinterpret_cast<BufferHead *>(buffer) = {free_buffer,   get_base,   init_tensor,
                                             memset_tensor, set_tensor, get_tensor};
  void **words = host.words_of(buffer);
  for (size_t i = sizeof(BufferHead) / sizeof(void *); i < host.buffer_words; i++) words[i] = nullptr;
  words[host.buffer_words - 2] = reinterpret_cast<void *>(clear_nothing);
  host.type_of(buffer) = type;
  host.context_of(buffer) = new Space{base, size, {}};
  return buffer;
}

/* ---- weights that llama.cpp multiplies faster ---- */

constexpr size_t kTimedBytes = size_t(8) << 20; /* of a timed matrix: more than an L2 cache holds */
constexpr int kTimedProducts = 5;
constexpr int64_t kTimedTokens[] = {1, 32};

/* Return the fastest of some products of a weight in a buffer of a type, in seconds; 0 if the host
   does not multiply it there. */
double time_product(BufferType *type, int weight_type, int64_t rows, int64_t inputs,
                    int64_t tokens) {
  Backend *backend = host.dev_init(host.device, nullptr);
  if (!backend) return 0;
  host.set_threads(backend, 1);
  Context *weights = host.init({4096, nullptr, true});
  Context *others = host.init({size_t(tokens * (rows + inputs)) * 4 + (size_t(1) << 20), nullptr,
                               false});
  Tensor *w = host.new_tensor_2d(weights, weight_type, inputs, rows);
  Buffer *buffer = host.buft_alloc(type, host.nbytes(w));
  double fastest = 0;
  const bool placed = buffer && !host.tensor_alloc(buffer, w, host.buffer_base(buffer));
  Tensor *x = host.new_tensor_2d(others, F32, inputs, tokens), *y = host.mul_mat(others, w, x);
  /* A type that does not take the weight may not be given its bytes either. */
  if (placed && host.dev_supports_op(host.device, y)) {
    std::vector<uint8_t> blocks(host.nbytes(w));
    for (size_t i = 0; i < blocks.size(); i++) blocks[i] = uint8_t(i * 2654435761u >> 24);
    for (size_t i = 0; i < blocks.size(); i += w->nb[0]) {
      blocks[i] = 0, blocks[i + 1] = 0x3c;                               /* scale 1 */
      if (weight_type == Q4_1) blocks[i + 2] = 0, blocks[i + 3] = 0xc8; /* minimum -8 */
    }
    host.tensor_set(w, blocks.data(), 0, blocks.size());
    for (int64_t i = 0; i < inputs * tokens; i++)
      static_cast<float *>(x->data)[i] = float(i % 255 - 127);
    Graph *graph = host.new_graph(others);
    host.build_forward(graph, y);
    for (int n = 0; n <= kTimedProducts; n++) {
      const auto began = std::chrono::steady_clock::now();
      if (host.graph_compute(backend, graph)) break;
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - began;
      if (n == 1 || (n > 1 && taken.count() < fastest)) fastest = taken.count(); /* 0: a warm-up */
    }
  }
  if (buffer) host.buffer_free(buffer);
  host.free(weights), host.free(others);
  host.backend_free(backend);
  return fastest;
}

/* Return the time of llama.cpp's own product, in the first of its types that takes the weight. */
double time_theirs(int type, int64_t rows, int64_t inputs, int64_t tokens) {
  std::vector<BufferType *> types(host.extra_types->begin() + 1, host.extra_types->end());
  types.push_back(host.dev_buffer_type(host.device));
  double taken = 0;
  for (size_t i = 0; i < types.size() && taken == 0; i++)
    taken = time_product(types[i], type, rows, inputs, tokens);
  return taken;
}

/* Whether llama.cpp's own repacked product of a weight of this shape is faster than ours, for one
   token or for several. Each shape is timed once per process. */
bool is_slower(const Tensor *w) {
  static std::mutex mutex;
  static std::map<std::vector<int64_t>, bool> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({w->type, w->ne[0], w->ne[1]});
  if (found != known.end()) return found->second;
  const int64_t most = std::max<int64_t>(16, int64_t(kTimedBytes / w->nb[1]));
  const int64_t rows = std::min(w->ne[1], most);
  bool slower = false;
  for (int64_t tokens : kTimedTokens) {
    counts.pause(true);
    const double ours = time_product(our_type, w->type, rows, w->ne[0], tokens);
    counts.pause(false);
    const double theirs = time_theirs(w->type, rows, w->ne[0], tokens);
    slower = slower || (ours > 0 && theirs > 0 && ours > theirs);
  }
  return known[{w->type, w->ne[0], w->ne[1]}] = slower;
}

/* ---- the buffer type ---- */

bool is_ours(const Tensor *w) { return w->buffer && host.type_of(w->buffer) == our_type; }

bool is_product(const Tensor *op) {
  return op->op == host.mul_mat_op || (op->op == host.mul_mat_id_op && takes_experts);
}

bool in_host_memory(const Tensor *x) {
  BufferType *type = x->buffer ? host.type_of(x->buffer) : nullptr;
  return !type || host.is_host_type(type);
}

class OurBufferType : public ExtraBufferType {
  /* llama.cpp asks before it loads a weight, and again for each product with it. */
  bool supports_op(Device *, const Tensor *op) override {
    if (!is_product(op) || !(usable || testing)) return false;
    const Tensor *w = op->src[0], *x = op->src[1];
    const bool fits = op->op == host.mul_mat_op ? w->ne[2] == 1 : op->src[2]->type == I32;
    const bool taken = is_ours(w) && !w->view_src && fits && w->ne[3] == 1 &&
                       (w->type == Q4_0 || w->type == Q4_1 || w->type == Q8_0) &&
                       x->type == F32 && x->nb[0] == 4 && in_host_memory(x);
    const bool may_leave = choice == Choice::measured && op->op == host.mul_mat_op && !w->data;
    const bool left = !taken || (may_leave && is_slower(w));
    if (left && !w->data) counts.add_other(w->type);
    return !left;
  }

  Traits *get_tensor_traits(const Tensor *op) override {
    if (!is_product(op) || !is_ours(op->src[0])) return nullptr;
    Weight *weight = weight_of(op->src[0]);
    if (!weight || weight->matrices.empty()) return nullptr;
    counts.print_once();
    return weight;
  }
} our_functions;

/* ---- start ---- */

constexpr int64_t kTestInputs = 64, kTestRows = 70;

/* Weight i of row r of a test matrix: its blocks have the scale 1. */
int8_t test_weight(const std::vector<uint8_t> &blocks, int64_t r, int64_t i) {
  return int8_t(blocks[size_t((r * kTestInputs + i) / 32 * 34 + 2 + i % 32)]);
}

std::vector<uint8_t> test_blocks(int64_t rows) {
  std::vector<uint8_t> blocks(size_t(rows * kTestInputs / 32 * 34));
  for (size_t i = 0; i < blocks.size(); i++) blocks[i] = uint8_t(i * 37 % 251);
  for (size_t i = 0; i < blocks.size(); i += 34) blocks[i] = 0, blocks[i + 1] = 0x3c;
  return blocks;
}

/* Let the host multiply w and x, and compare the result with sums computed here.
   ids: the experts of every token; null without experts. */
bool result_is_right(Backend *backend, Context *others, Tensor *w, Tensor *x, Tensor *ids,
                     const std::vector<uint8_t> &blocks) {
  auto *in = static_cast<float *>(x->data);
  const int64_t tokens = ids ? ids->ne[1] : x->ne[1], used = ids ? ids->ne[0] : 1;
  for (int64_t i = 0; i < kTestInputs * tokens; i++)
    in[i] = i % 32 ? float(i * 29 % 255 - 127) : 127; /* the scale is 1: rounding is exact */
  auto *chosen = ids ? static_cast<int32_t *>(ids->data) : nullptr;
  for (int64_t i = 0; chosen && i < used * tokens; i++) chosen[i] = int32_t(i * 2 % w->ne[2]);
  Tensor *y = ids ? host.mul_mat_id(others, w, x, ids) : host.mul_mat(others, w, x);
  auto *out = static_cast<float *>(y->data);
  memset(out, 0, size_t(kTestRows * used * tokens) * sizeof(float));
  Graph *graph = host.new_graph(others);
  host.build_forward(graph, y);
  bool right = host.dev_supports_op(host.device, y) && !host.graph_compute(backend, graph);
  for (int64_t i = 0; i < used * tokens; i++)
    for (int64_t r = 0; r < kTestRows; r++) {
      const int64_t row = (chosen ? chosen[i] : 0) * kTestRows + r;
      double sum = 0;
      for (int64_t j = 0; j < kTestInputs; j++)
        sum += test_weight(blocks, row, j) * double(in[i / used * kTestInputs + j]);
      right = right && std::fabs(out[i * kTestRows + r] - sum) <= 1e-5 * std::fabs(sum) + 0.5;
    }
  return right;
}

/* Compute products of a small matrix, or of several experts, by the host.
   experts: their number; 0: one matrix without experts. */
bool product_is_right(int64_t tokens, int threads, int64_t experts) {
  Backend *backend = host.dev_init(host.device, nullptr);
  if (!backend) return false;
  host.set_threads(backend, threads);
  Context *weights = host.init({4096, nullptr, true});
  Context *others = host.init({size_t(1) << 20, nullptr, false});
  Tensor *w = experts ? host.new_tensor_3d(weights, Q8_0, kTestInputs, kTestRows, experts)
                      : host.new_tensor_2d(weights, Q8_0, kTestInputs, kTestRows);
  Buffer *buffer = host.buft_alloc(our_type, host.nbytes(w));
  bool right = buffer && !host.tensor_alloc(buffer, w, host.buffer_base(buffer));
  if (right) {
    const std::vector<uint8_t> blocks = test_blocks(kTestRows * std::max<int64_t>(1, experts));
    host.tensor_set(w, blocks.data(), 0, blocks.size());
    Tensor *x = experts ? host.new_tensor_3d(others, F32, kTestInputs, 1, tokens)
                        : host.new_tensor_2d(others, F32, kTestInputs, tokens);
    Tensor *ids = experts ? host.new_tensor_2d(others, I32, 2, tokens) : nullptr;
    right = result_is_right(backend, others, w, x, ids, blocks);
  }
  if (buffer) host.buffer_free(buffer);
  host.free(weights), host.free(others);
  host.backend_free(backend);
  return right;
}

/* Run the products in a child process first: a host with other virtual functions may crash. */
bool survives_products(int64_t experts) {
  const pid_t child = fork();
  if (child < 0) return false;
  if (!child) {
    const rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGALRM}) signal(number, SIG_DFL);
    alarm(kTestSeconds);
    if (!freopen("/dev/null", "w", stderr)) _exit(1);
    _exit(product_is_right(1, 1, experts) && product_is_right(5, 1, experts) ? 0 : 1);
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0)
    if (errno != EINTR) return false;
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

bool products_are_right(int64_t experts) {
  return survives_products(experts) && product_is_right(1, 2, experts) &&
         product_is_right(5, 2, experts);
}

/* Read a variable of the environment, one of several words. Returns the index; -1 for another. */
int read_word(const char *name, const std::vector<const char *> &words) {
  const char *value = getenv(name);
  if (!value || !*value) return 0;
  for (size_t i = 0; i < words.size(); i++)
    if (!strcmp(value, words[i])) return int(i);
  why_not = std::string(name) + ": found '" + std::string(value).substr(0, 40) + "'; allowed are";
  for (size_t i = 0; i < words.size(); i++)
    why_not += (i ? i + 1 < words.size() ? ", " : " and " : " ") + std::string(words[i]);
  return -1;
}

bool read_settings() {
  const int form = read_word("SQFT_FORM", {"auto", "dense", "sparse"});
  const int group = read_word("SQFT_GROUP", {"32", "64", "128"});
  const int with_float = read_word("SQFT_EXACT", {"0", "1"});
  const int chosen = read_word("SQFT_CHOICE", {"ours", "measured"});
  if (form < 0 || group < 0 || with_float < 0 || chosen < 0) return false;
  choice = Choice(chosen);
  options.form = Form(form);
  options.group = size_t(32) << group;
  exact = with_float == 1;
  const char *wanted = getenv("SQFT_KERNELS");
  kernels = sqft_kernels(wanted);
  if (!kernels)
    why_not = "SQFT_KERNELS: this processor has no kernels of that name";
  else if (wanted || !strncmp(kernels->name, "avx", 3))
    options.lanes = kernels->lanes;
  else /* only those for AVX2 and AVX-512 were measured to be faster than llama.cpp's */
    why_not = "this processor has no AVX2, and other kernels of ours are not faster";
  return why_not.empty();
}

const char *our_name(BufferType *) { return "CPU_SQFT"; }
size_t our_alignment(BufferType *) { return 64; }

/* Put our type into the host's list, and test products with it. */
const char *enter_list() {
  our_type->get_name = our_name;
  our_type->alloc_buffer = alloc_buffer;
  host.type_word(our_type, host.places.alignment) = reinterpret_cast<void *>(our_alignment);
  host.type_device(our_type) = host.device;
  host.type_context(our_type) = static_cast<ExtraBufferType *>(&our_functions);
  host.extra_types->insert(host.extra_types->begin(), our_type);
  /* The host copies the list when it is first requested, which loading a model does. */
  if (host.extra_types_of(host.device)[0] != our_type) {
    host.extra_types->erase(host.extra_types->begin());
    return "a model was loaded before; load the plug-in first";
  }
  testing = true;
  const bool right = products_are_right(0);
  takes_experts = right && host.mul_mat_id_op >= 0 && products_are_right(3);
  testing = false;
  usable = right;
  /* The type stays in the list, since the host has copied it, but takes no weight. */
  return usable ? nullptr : "a test product was wrong";
}

/* A backend without devices: ggml expects one from a library that it loads. */
const char *backend_name(Registration *) { return "SQFT"; }
size_t no_devices(Registration *) { return 0; }
Device *no_device(Registration *, size_t) { return nullptr; }
void *no_address(Registration *, const char *) { return nullptr; }
Registration registration = {0, backend_name, no_devices, no_device, no_address, nullptr};

bool setting_is(const char *word) {
  const char *setting = getenv("SQFT_GGML");
  return setting && !strcmp(setting, word);
}

/* Print the answer to `sqft-export llama-plugin --check` as one line of JSON, and exit. */
[[noreturn]] void answer_check() {
  for (char &c : why_not)
    if (c == '"' || c == '\\' || c < ' ') c = '\'';
  const bool found = why_not.empty();
  fprintf(stderr,
          "sqft-check: {\"supported\": %s, \"reason\": \"%s\", \"linked_in\": %s, \"gpu\": %s, "
          "\"ggml\": \"%s\", \"kernels\": \"%s\"}\n",
          found ? "true" : "false", why_not.c_str(), host.cpu_linked_in ? "true" : "false",
          found && host.has_pinned_memory() ? "true" : "false",
          host.version ? host.version() : "", kernels ? kernels->name : "");
  _exit(0);
}

void find_and_enter(const void *caller) {
  if (setting_is("off")) {
    why_not = "SQFT_GGML=off";
    return;
  }
  if (!read_settings()) return;
  const char *reason = find_host(host, caller, setting_is("check"));
  if (!reason) reason = enter_list();
  if (reason) why_not = reason;
}

/* Start in the ggml in which `caller` lies. Returns null if our kernels are not used. */
Registration *start(const void *caller) {
  static std::once_flag once;
  std::call_once(once, [caller] {
    find_and_enter(caller);
    if (setting_is("check")) answer_check();
    if (!why_not.empty())
      print_line("our kernels are not used: %s", why_not.c_str());
    else
      registration.api_version = host.cpu->api_version;
  });
  if (!usable) return nullptr;
  if (library_of(caller) == host.library) return &registration;
  why_not = "another ggml of this process uses them";
  print_line("our kernels are not used: %s", why_not.c_str());
  return nullptr;
}

/* Programs with the CPU backend linked in may not read GGML_BACKEND_PATH. They need LD_PRELOAD. */
bool start_if_preloaded() {
  Dl_info self;
  const char *list = getenv("LD_PRELOAD");
  if (!list || !dladdr(reinterpret_cast<void *>(start_if_preloaded), &self) || !self.dli_fname ||
      !strstr(list, self.dli_fname))
    return false;
  if (const void *loader = dlsym(RTLD_DEFAULT, "ggml_backend_load")) {
    start(loader);
  } else if (setting_is("check")) {
    why_not = "the program has no visible ggml: it is not llama.cpp, or a static build";
    answer_check();
  }
  return true;
}

const bool preloaded = start_if_preloaded(); /* the last variable to be initialized */

}  // namespace
}  // namespace sqft

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT sqft::Registration *ggml_backend_init() {
  return sqft::start(__builtin_return_address(0));
}

/* Why our kernels are not used; an empty text if they are. */
EXPORT const char *sqft_ggml_reason() { return sqft::why_not.c_str(); }

/* Whether activations stay float32; SQFT_EXACT is the value at the start. */
EXPORT void sqft_ggml_set_exact(int exact) { sqft::exact = exact != 0; }
