/* A small host with the part of ggml's interface that the plug-in uses, written for the tests.
   DOCTOR (environment) names one thing that it does otherwise than the ggml we know. */
#include <dlfcn.h>

#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

bool doctored(const char *what) {
  const char *doctor = getenv("DOCTOR");
  return doctor && !strcmp(doctor, what);
}

struct Buffer;
struct Device {};
Device cpu_device, gpu_device;

/* Functions, then device and context. Version 3 of the interface has two more functions. */
struct Type {
  void *words[10];
};
size_t device_place() { return doctored("newer") ? 8 : 6; }
void *context_of(Type *type) { return type->words[device_place() + 1]; }

struct Tensor {
  int32_t type;
  Buffer *buffer;
  int64_t ne[4];
  size_t nb[4];
  int32_t op, op_params[16], flags;
  Tensor *src[10];
  Tensor *view_src;
  size_t view_offs;
  void *data;
  char name[64];
  void *extra;
  char padding[8];
};

struct Buffer {
  void (*free_buffer)(Buffer *);
  void *(*get_base)(Buffer *);
  int (*init_tensor)(Buffer *, Tensor *);
  void (*memset_tensor)(Buffer *, Tensor *, uint8_t, size_t, size_t);
  void (*set_tensor)(Buffer *, Tensor *, const void *, size_t, size_t);
  void (*get_tensor)(Buffer *, const Tensor *, void *, size_t, size_t);
  void *others[5];
  Type *type;
  void *context;
  size_t size;
  int usage;
};

struct Pool {
  std::mutex mutex;
  std::condition_variable changed;
  int threads = 1, waiting = 0, turn = 0;
};

struct Params {
  int ith, nth;
  size_t wsize;
  void *wdata;
  Pool *pool;
};

struct Traits {
  virtual ~Traits() = default;
  virtual bool work_size(int threads, const Tensor *op, size_t &size) = 0;
  virtual bool compute_forward(Params *params, Tensor *op) = 0;
};
struct OtherTraits { /* the same functions in another order */
  virtual bool compute_forward(Params *params, Tensor *op) = 0;
  virtual bool work_size(int threads, const Tensor *op, size_t &size) = 0;
  virtual ~OtherTraits() = default;
};
struct Extra {
  virtual ~Extra() = default;
  virtual bool supports_op(Device *device, const Tensor *op) = 0;
  virtual Traits *get_tensor_traits(const Tensor *op) = 0;
};

struct Context {
  std::vector<char> memory;
  size_t used = 0;
  bool no_alloc;
};
struct Graph {
  Tensor *node;
};
struct Backend {
  int threads = 4;
};

enum { MUL_MAT = 29, MUL_MAT_ID = 30, VIEW = 37 };
int product_number() { return doctored("number") ? 31 : MUL_MAT; }

size_t row_bytes(int type, int64_t n) {
  const size_t blocks = size_t(n) / 32;
  return type == 0 || type == 26 ? 4 * size_t(n) : type == 8 ? 34 * blocks : (type == 3 ? 20 : 18) * blocks;
}
size_t unit(int type) { return type == 0 || type == 26 ? 4 : type == 8 ? 34 : type == 3 ? 20 : 18; }
size_t bytes_of(const Tensor *t) {
  return row_bytes(t->type, t->ne[0]) * size_t(t->ne[1] * t->ne[2]);
}

const char *cpu_name(Type *) { return "CPU"; }
bool yes(Type *) { return true; }
void *base_of(Buffer *b) { return b->context; }
Buffer *alloc_plain(Type *, size_t);
Type *cpu_type() {
  static Type type = [] {
    Type made = {};
    made.words[0] = reinterpret_cast<void *>(cpu_name);
    made.words[1] = reinterpret_cast<void *>(alloc_plain);
    made.words[device_place() - 1] = reinterpret_cast<void *>(yes);
    made.words[device_place()] = &cpu_device;
    return made;
  }();
  return &type;
}

/* Buffers of plain memory, in which tensors have the bytes of the file. */
void free_plain(Buffer *b) { free(b->context); }
void set_plain(Buffer *, Tensor *t, const void *data, size_t offset, size_t size) {
  memcpy(static_cast<char *>(t->data) + offset, data, size);
}
Buffer *alloc_plain(Type *type, size_t size) {
  auto *b = new Buffer{};
  b->free_buffer = free_plain, b->get_base = base_of, b->set_tensor = set_plain;
  b->type = type, b->size = size, b->context = malloc(size);
  return b;
}

std::vector<Type *> &list() {
  static std::vector<Type *> types;
  return types;
}
Type **copied_list(Device *) {
  static std::vector<Type *> copy = [] {
    std::vector<Type *> types = list();
    types.push_back(nullptr);
    return types;
  }();
  return copy.data();
}
void set_threads(Backend *b, int n) { b->threads = n; }

struct Registration {
  int version;
  const char *(*get_name)(Registration *);
  size_t (*get_device_count)(Registration *);
  Device *(*get_device)(Registration *, size_t);
  void *(*get_proc_address)(Registration *, const char *);
  void *context;
};
void *proc_address(Registration *, const char *name) {
  if (!strcmp(name, "ggml_backend_dev_get_extra_bufts") && !doctored("no list"))
    return reinterpret_cast<void *>(copied_list);
  if (!strcmp(name, "ggml_backend_set_n_threads")) return reinterpret_cast<void *>(set_threads);
  return nullptr;
}
bool backends_loaded = false;
Registration cpu = {2, nullptr, nullptr, nullptr, proc_address, nullptr};

float half(const uint8_t *p) {
  uint16_t h;
  memcpy(&h, p, 2);
  const int e = h >> 10 & 31, f = h & 1023;
  const float v = e ? ldexpf(float(1024 + f), e - 25) : ldexpf(float(f), -24);
  return h >> 15 ? -v : v;
}
/* r: row, counted over all experts */
float weight_at(const Tensor *w, int64_t r, int64_t i) {
  const uint8_t *b = static_cast<const uint8_t *>(w->data) + w->nb[1] * size_t(r) +
                     size_t(i) / 32 * unit(w->type);
  const int j = int(i % 32);
  if (w->type == 8) return half(b) * int8_t(b[2 + j]);
  const uint8_t *codes = b + (w->type == 3 ? 4 : 2);
  const int code = j < 16 ? codes[j] & 15 : codes[j - 16] >> 4;
  return w->type == 3 ? half(b) * float(code) + half(b + 2) : half(b) * float(code - 8);
}
void plain_product(Params *p, Tensor *op) {
  const Tensor *w = op->src[0], *x = op->src[1], *ids = op->src[2];
  if (p->ith || doctored("fast")) return;
  const int64_t used = ids ? ids->ne[0] : 1, pairs = ids ? used * ids->ne[1] : x->ne[1];
  for (int64_t n = 0; n < pairs; n++)
    for (int64_t r = 0; r < w->ne[1]; r++) {
      const int64_t expert = ids ? static_cast<int32_t *>(ids->data)[n] : 0;
      const int64_t t = ids ? n / used * x->ne[1] + n % used % x->ne[1] : n;
      double sum = 0;
      for (int64_t i = 0; i < w->ne[0]; i++)
        sum += double(weight_at(w, expert * w->ne[1] + r, i)) *
               static_cast<float *>(x->data)[t * w->ne[0] + i];
      static_cast<float *>(op->data)[n * w->ne[1] + r] = float(sum);
    }
}
Traits *traits_of(const Tensor *op) {
  for (Type *type : list())
    if (Traits *found = static_cast<Extra *>(context_of(type))->get_tensor_traits(op)) return found;
  return nullptr;
}
void run_node(Params *p, Tensor *op) {
  Traits *traits = traits_of(op);
  if (!traits) return plain_product(p, op);
  if (doctored("functions"))
    reinterpret_cast<OtherTraits *>(traits)->compute_forward(p, op);
  else
    traits->compute_forward(p, op);
  if (doctored("product") && !p->ith) static_cast<float *>(op->data)[0] += 1000;
  if (doctored("experts") && !p->ith && op->src[2]) static_cast<float *>(op->data)[0] += 1000;
}

}  // namespace

/* ggml's is a C++ function: this is its name in the library. */
EXPORT void *extra_buffer_types() __asm__("_Z39ggml_backend_cpu_get_extra_buffer_typesv");
EXPORT void *extra_buffer_types() { return &list(); }

struct InitParams {
  size_t size;
  void *memory;
  bool no_alloc;
};
EXPORT Context *ggml_init(InitParams p) {
  auto *c = new Context;
  c->memory.resize(p.size + 64), c->no_alloc = p.no_alloc;
  return c;
}
EXPORT void ggml_free(Context *c) { delete c; }
EXPORT size_t ggml_tensor_overhead() { return 32 + sizeof(Tensor) + (doctored("size") ? 16 : 0); }
EXPORT Tensor *ggml_new_tensor_3d(Context *c, int type, int64_t n, int64_t rows, int64_t parts) {
  char *at = c->memory.data() + c->used + 32;
  auto *t = new (at) Tensor{};
  t->type = type, t->ne[0] = n, t->ne[1] = rows, t->ne[2] = parts, t->ne[3] = 1;
  t->nb[0] = unit(type), t->nb[1] = row_bytes(type, n);
  t->nb[2] = t->nb[1] * size_t(rows), t->nb[3] = t->nb[2] * size_t(parts);
  c->used += ggml_tensor_overhead();
  if (!c->no_alloc) {
    t->data = c->memory.data() + c->used;
    c->used += (bytes_of(t) + 63) / 64 * 64;
  }
  return t;
}
EXPORT Tensor *ggml_new_tensor_2d(Context *c, int type, int64_t n, int64_t rows) {
  return ggml_new_tensor_3d(c, type, n, rows, 1);
}
EXPORT Tensor *ggml_mul_mat_id(Context *c, Tensor *a, Tensor *b, Tensor *ids) {
  Tensor *t = ggml_new_tensor_3d(c, 0, a->ne[1], ids->ne[0], b->ne[2]);
  t->op = MUL_MAT_ID, t->src[0] = a, t->src[1] = b, t->src[2] = ids;
  return t;
}
EXPORT Tensor *ggml_mul_mat(Context *c, Tensor *a, Tensor *b) {
  Tensor *t = ggml_new_tensor_2d(c, 0, a->ne[1], b->ne[1]);
  t->op = product_number(), t->src[0] = a, t->src[1] = b;
  return t;
}
EXPORT Tensor *ggml_view_1d(Context *c, Tensor *a, int64_t n, size_t offset) {
  Tensor *t = ggml_new_tensor_2d(c, a->type, n, 1);
  t->op = VIEW, t->view_src = a, t->view_offs = offset, t->src[0] = a;
  return t;
}
EXPORT const char *ggml_get_name(const Tensor *t) { return t->name + (doctored("field") ? 8 : 0); }
EXPORT const char *ggml_op_name(int op) {
  if (op == MUL_MAT_ID) return "MUL_MAT_ID";
  return op == product_number() ? doctored("operator") ? "OUT_PROD" : "MUL_MAT" : "VIEW";
}
EXPORT const char *ggml_type_name(int type) {
  return type == 8 ? "q8_0" : type == 3 ? "q4_1" : type == 2 ? "q4_0" : "f32";
}
EXPORT size_t ggml_nbytes(const Tensor *t) { return bytes_of(t); }
EXPORT const char *ggml_version() { return "test"; }
EXPORT Registration *ggml_backend_reg_by_name(const char *) {
  cpu.version = doctored("version") ? 4 : doctored("newer") ? 3 : 2;
  if (doctored("late")) copied_list(nullptr);
  return doctored("no cpu") || (doctored("dynamic") && !backends_loaded) ? nullptr : &cpu;
}
EXPORT void *ggml_backend_reg_get_proc_address(Registration *r, const char *name) {
  return r->get_proc_address(r, name);
}
EXPORT Device *ggml_backend_reg_dev_get(Registration *, size_t) { return &cpu_device; }
EXPORT size_t ggml_backend_dev_count() { return doctored("gpu") ? 2 : 1; }
EXPORT Device *ggml_backend_dev_get(size_t i) { return i ? &gpu_device : &cpu_device; }
EXPORT Type *ggml_backend_dev_buffer_type(Device *) { return cpu_type(); }
EXPORT Type *ggml_backend_dev_host_buffer_type(Device *d) {
  return d == &gpu_device ? cpu_type() : nullptr;
}
EXPORT void ggml_backend_load_all() { backends_loaded = true; }
EXPORT const char *ggml_backend_buft_name(Type *t) {
  return reinterpret_cast<const char *(*)(Type *)>(t->words[0])(t);
}
EXPORT Device *ggml_backend_buft_get_device(Type *t) {
  return static_cast<Device *>(t->words[device_place()]);
}
EXPORT Buffer *ggml_backend_cpu_buffer_from_ptr(void *memory, size_t size) {
  auto *b = new Buffer{};
  b->get_base = base_of, b->type = cpu_type(), b->context = memory, b->size = size;
  if (doctored("buffer")) memmove(&b->others[4], &b->type, 3 * sizeof(void *));
  return b;
}
EXPORT void ggml_backend_buffer_free(Buffer *b) {
  if (b->free_buffer) b->free_buffer(b);
  delete b;
}
EXPORT void ggml_backend_tensor_set(Tensor *t, const void *data, size_t offset, size_t size) {
  t->buffer->set_tensor(t->buffer, t, data, offset, size);
}
EXPORT int ggml_backend_tensor_alloc(Buffer *b, Tensor *t, void *address) {
  t->buffer = b, t->data = address;
  return b->init_tensor ? b->init_tensor(b, t) : 0;
}
EXPORT Buffer *ggml_backend_buft_alloc_buffer(Type *t, size_t size) {
  return reinterpret_cast<Buffer *(*)(Type *, size_t)>(t->words[1])(t, size);
}
EXPORT void *ggml_backend_buffer_get_base(Buffer *b) { return b->get_base(b); }
EXPORT Graph *ggml_new_graph(Context *) {
  static Graph graph;
  return &graph;
}
EXPORT void ggml_build_forward_expand(Graph *g, Tensor *t) { g->node = t; }
EXPORT Backend *ggml_backend_dev_init(Device *, const char *) { return new Backend; }
EXPORT void ggml_backend_free(Backend *b) { delete b; }
EXPORT bool ggml_backend_dev_supports_op(Device *d, const Tensor *op) {
  Type *type = op->src[0]->buffer ? op->src[0]->buffer->type : nullptr;
  if (type == cpu_type()) return true;
  return type && static_cast<Extra *>(context_of(type))->supports_op(d, op);
}
EXPORT void ggml_barrier(Pool *pool) {
  std::unique_lock<std::mutex> lock(pool->mutex);
  const int turn = pool->turn;
  if (++pool->waiting == pool->threads) {
    pool->waiting = 0, pool->turn++;
    pool->changed.notify_all();
  } else {
    pool->changed.wait(lock, [&] { return pool->turn != turn; });
  }
}
EXPORT int ggml_backend_graph_compute(Backend *backend, Graph *graph) {
  size_t size = 0;
  if (Traits *traits = traits_of(graph->node))
    if (!doctored("functions")) traits->work_size(backend->threads, graph->node, size);
  std::vector<char> work(size);
  Pool pool;
  pool.threads = backend->threads;
  std::vector<std::thread> threads;
  for (int i = 1; i < backend->threads; i++)
    threads.emplace_back([&, i] {
      Params p = {i, backend->threads, size, work.data(), &pool};
      run_node(&p, graph->node);
    });
  Params p = {0, backend->threads, size, work.data(), &pool};
  run_node(&p, graph->node);
  for (std::thread &t : threads) t.join();
  return 0;
}
EXPORT void *ggml_backend_load(const char *path) {
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void *start = library ? dlsym(library, "ggml_backend_init") : nullptr;
  return start ? reinterpret_cast<void *(*)()>(start)() : nullptr;
}

/* Multiply as a program does: a weight in the first buffer type of the list, set in `parts` calls,
   read back into `stored`.
   ids: experts [used, tokens], or null. x: [tokens, inputs]. y: [tokens, used, rows].
   Returns 0, or 1 if the type does not take the weight. */
EXPORT int host_multiply_experts(int type, const uint8_t *blocks, int64_t rows, int64_t inputs,
                                 int64_t experts, const int32_t *ids, int64_t used, const float *x,
                                 int64_t tokens, int threads, int parts, float *y,
                                 uint8_t *stored) {
  Context *c = ggml_init({size_t(1) << 16, nullptr, true});
  Tensor *w = ggml_new_tensor_3d(c, type, inputs, rows, experts);
  Tensor *in = ids ? ggml_new_tensor_3d(c, 0, inputs, 1, tokens) : ggml_new_tensor_2d(c, 0, inputs, tokens);
  Tensor *chosen = ids ? ggml_new_tensor_2d(c, 26, used, tokens) : nullptr;
  if (chosen) chosen->data = const_cast<int32_t *>(ids);
  Tensor *out = ids ? ggml_mul_mat_id(c, w, in, chosen) : ggml_mul_mat(c, w, in);
  in->data = const_cast<float *>(x), out->data = y;
  Buffer *buffer = ggml_backend_buft_alloc_buffer(list()[0], bytes_of(w) + 64);
  w->buffer = buffer; /* a program asks before it has memory for the weight */
  const bool taken = ggml_backend_dev_supports_op(&cpu_device, out);
  if (taken) {
    ggml_backend_tensor_alloc(buffer, w, buffer->get_base(buffer));
    const size_t size = bytes_of(w);
    for (int i = 0; i < parts; i++) {
      const size_t first = size * size_t(i) / size_t(parts), end = size * size_t(i + 1) / size_t(parts);
      ggml_backend_tensor_set(w, blocks + first, first, end - first);
    }
    Backend backend = {threads};
    Graph graph = {out};
    ggml_backend_graph_compute(&backend, &graph);
    buffer->get_tensor(buffer, w, stored, 0, size);
  }
  ggml_backend_buffer_free(buffer);
  ggml_free(c);
  return !taken;
}
EXPORT int host_multiply(int type, const uint8_t *blocks, int64_t rows, int64_t inputs,
                         const float *x, int64_t tokens, int threads, int parts, float *y,
                         uint8_t *stored) {
  return host_multiply_experts(type, blocks, rows, inputs, 1, nullptr, 1, x, tokens, threads, parts,
                               y, stored);
}
