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
constexpr unsigned kTestSeconds = 20;

Host host;
const SqftKernels *kernels;
PackOptions options{Form::automatic, 32, 8};
bool exact;
bool testing, usable; /* during, and after, test products that were right */
BufferType our_type;
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

/* A tensor in our buffer. Without a matrix, its bytes are those of the file, in their place, and
   llama.cpp multiplies with them. */
class Weight : public Traits {
 public:
  std::shared_ptr<SqftMatrix> matrix;
  bool plain = false; /* counted as multiplied by llama.cpp */

  bool work_size(int threads, const Tensor *op, size_t &size) override {
    const size_t tokens = token_count(op->src[1]), n = size_t(threads);
    if (tokens == 1) {
      size = 64 + n * Workspace(matrix.get(), 1).inputs;
      return true;
    }
    size = 64 + n * Workspace(matrix.get(), std::min(tokens, kTokensPerPass)).scratch;
    for (size_t t = 0; t < tokens; t += kTokensPerPass)
      size += Workspace(matrix.get(), std::min(tokens - t, kTokensPerPass)).inputs;
    return true;
  }

  bool compute_forward(ComputeParams *params, Tensor *op) override {
    const size_t i = size_t(params->ith), n = size_t(params->nth);
    const size_t first = matrix->tiles * i / n, last = matrix->tiles * (i + 1) / n;
    const Tensor *x = op->src[1];
    auto *y = static_cast<float *>(op->data);
    auto *memory = reinterpret_cast<uint8_t *>(align(reinterpret_cast<uintptr_t>(params->wdata)));
    if (exact)
      multiply_exact(x, y, first, last);
    else if (token_count(x) == 1)
      multiply_one(x, y, first, last, memory + i * Workspace(matrix.get(), 1).inputs);
    else
      multiply_many(params, x, y, first, last, memory);
    return true;
  }

 private:
  /* Activations in float32, as a reference. */
  void multiply_exact(const Tensor *x, float *y, size_t first, size_t last) const {
    const size_t row = size_t(x->ne[0]) * sizeof(float);
    const size_t adjacent = x->nb[1] == row ? size_t(x->ne[1]) : 1;
    for (size_t t = 0; t < token_count(x); t += adjacent)
      sqft_exact(matrix.get(), token_at(x, t), adjacent, y + t * matrix->rows, first, last);
  }

  /* Each thread rounds the token for itself, which takes less time than waiting for another. */
  void multiply_one(const Tensor *x, float *y, size_t first, size_t last, uint8_t *memory) const {
    SqftInputs in = Workspace(matrix.get(), 1).at(memory);
    kernels->round(matrix.get(), token_at(x, 0), 0, 1, &in);
    kernels->one(matrix.get(), &in, y, first, last);
  }

  void multiply_many(const ComputeParams *params, const Tensor *x, float *y, size_t first,
                     size_t last, uint8_t *memory) const {
    const SqftMatrix *m = matrix.get();
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
};

/* ---- the line that counts tensors ---- */

/* Tensors of the model that was loaded last, by type. */
class Counts {
 public:
  void add_packed(int type, bool sparse) {
    if (!usable) return; /* the test products */
    const std::lock_guard<std::mutex> lock(mutex_);
    packed_[type]++, sparse_ += sparse, printed_ = false;
  }
  void add_other(int type) {
    const std::lock_guard<std::mutex> lock(mutex_);
    other_[type]++;
  }
  /* Print the counts once per model: at its first product, when all tensors are loaded. */
  void print_once() {
    if (printed_.load(std::memory_order_relaxed) || printed_.exchange(true)) return;
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
  if (!weight || !weight->matrix) return;
  unpack_blocks(weight->matrix.get(), tensor->type, static_cast<uint8_t *>(tensor->data));
  weight->matrix.reset();
}

std::shared_ptr<SqftMatrix> try_to_pack(const Tensor *tensor, const void *data) {
  try {
    return pack_blocks(static_cast<const uint8_t *>(data), tensor->type, size_t(tensor->ne[1]),
                       size_t(tensor->ne[0]), options);
  } catch (const std::bad_alloc &) {
    return nullptr;
  }
}

void set_tensor(Buffer *, Tensor *tensor, const void *data, size_t offset, size_t size) {
  Weight *weight = weight_of(tensor);
  const bool whole = offset == 0 && size == host.nbytes(tensor);
  if (weight && whole && (weight->matrix = try_to_pack(tensor, data))) {
    counts.add_packed(tensor->type, weight->matrix->format != SQFT_DENSE);
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
  if (weight && weight->matrix) {
    blocks.resize(host.nbytes(tensor));
    unpack_blocks(weight->matrix.get(), tensor->type, blocks.data());
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

/* ---- the buffer type ---- */

bool is_ours(const Tensor *w) { return w->buffer && host.type_of(w->buffer) == &our_type; }

bool in_host_memory(const Tensor *x) {
  BufferType *type = x->buffer ? host.type_of(x->buffer) : nullptr;
  return !type || (type->is_host && type->is_host(type));
}

class OurBufferType : public ExtraBufferType {
  /* llama.cpp asks before it loads a weight, and again for each product with it. */
  bool supports_op(Device *, const Tensor *op) override {
    if (op->op != host.mul_mat_op || !(usable || testing)) return false;
    const Tensor *w = op->src[0], *x = op->src[1];
    const bool taken = is_ours(w) && !w->view_src &&
                       (w->type == Q4_0 || w->type == Q4_1 || w->type == Q8_0) &&
                       w->ne[2] == 1 && w->ne[3] == 1 && x->type == F32 && x->nb[0] == 4 &&
                       in_host_memory(x);
    if (!taken && !w->data) counts.add_other(w->type);
    return taken;
  }

  Traits *get_tensor_traits(const Tensor *op) override {
    if (op->op != host.mul_mat_op || !is_ours(op->src[0])) return nullptr;
    Weight *weight = weight_of(op->src[0]);
    if (!weight || !weight->matrix) return nullptr;
    counts.print_once();
    return weight;
  }
} our_functions;

/* ---- start ---- */

/* Compute products of a small matrix by the host, and compare them with sums computed here. */
bool product_is_right(int64_t tokens, int threads) {
  const int64_t inputs = 64, rows = 70;
  std::vector<uint8_t> blocks(size_t(rows * inputs / 32 * 34));
  for (size_t i = 0; i < blocks.size(); i++) blocks[i] = uint8_t(i * 37 % 251);
  for (size_t i = 0; i < blocks.size(); i += 34) blocks[i] = 0, blocks[i + 1] = 0x3c; /* scale 1 */
  Backend *backend = host.dev_init(host.device, nullptr);
  if (!backend) return false;
  host.set_threads(backend, threads);
  Context *weights = host.init({4096, nullptr, true});
  Context *others = host.init({size_t(1) << 20, nullptr, false});
  Tensor *w = host.new_tensor_2d(weights, Q8_0, inputs, rows);
  Buffer *buffer = host.buft_alloc(&our_type, host.nbytes(w));
  bool right = buffer && !host.tensor_alloc(buffer, w, host.buffer_base(buffer));
  if (right) {
    host.tensor_set(w, blocks.data(), 0, blocks.size());
    Tensor *x = host.new_tensor_2d(others, F32, inputs, tokens), *y = host.mul_mat(others, w, x);
    auto *in = static_cast<float *>(x->data), *out = static_cast<float *>(y->data);
    for (int64_t i = 0; i < inputs * tokens; i++)
      in[i] = i % 32 ? float(i * 29 % 255 - 127) : 127; /* the scale is 1: rounding is exact */
    memset(out, 0, size_t(rows * tokens) * sizeof(float));
    Graph *graph = host.new_graph(others);
    host.build_forward(graph, y);
    right = host.dev_supports_op(host.device, y) && !host.graph_compute(backend, graph);
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t r = 0; r < rows; r++) {
        double sum = 0;
        for (int64_t i = 0; i < inputs; i++)
          sum += int8_t(blocks[size_t((r * inputs + i) / 32 * 34 + 2 + i % 32)]) *
                 double(in[t * inputs + i]);
        right = right && std::fabs(out[t * rows + r] - sum) <= 1e-5 * std::fabs(sum) + 0.5;
      }
  }
  if (buffer) host.buffer_free(buffer);
  host.free(weights), host.free(others);
  host.backend_free(backend);
  return right;
}

/* Run the products in a child process first: a host with other virtual functions may crash. */
bool survives_products() {
  const pid_t child = fork();
  if (child < 0) return false;
  if (!child) {
    const rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGALRM}) signal(number, SIG_DFL);
    alarm(kTestSeconds);
    if (!freopen("/dev/null", "w", stderr)) _exit(1);
    _exit(product_is_right(1, 1) && product_is_right(5, 1) ? 0 : 1);
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0)
    if (errno != EINTR) return false;
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
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
  if (form < 0 || group < 0 || with_float < 0) return false;
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
  our_type = {our_name, alloc_buffer, our_alignment,  nullptr, nullptr,
              nullptr,  host.device,  &our_functions};
  host.extra_types->insert(host.extra_types->begin(), &our_type);
  /* The host copies the list when it is first requested, which loading a model does. */
  if (host.extra_types_of(host.device)[0] != &our_type) {
    host.extra_types->erase(host.extra_types->begin());
    return "a model was loaded before; load the plug-in first";
  }
  testing = true;
  usable = survives_products() && product_is_right(1, 2) && product_is_right(5, 2);
  testing = false;
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
