#include "host.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace sqft {
namespace {

constexpr const char *kOtherStructures = "the structures of this ggml differ from those we know";
constexpr const char *kHidden =
    "the program hides the functions of its ggml (a static build); use a build with shared libraries";
constexpr size_t kObjectHead = 32; /* bytes of a ggml context before every tensor */

struct Function {
  const char *name;
  void *address; /* of the pointer in Host */
};

const char *find_functions(Host &h) {
  const Function wanted[] = {
      {"ggml_init", &h.init},
      {"ggml_free", &h.free},
      {"ggml_new_tensor_2d", &h.new_tensor_2d},
      {"ggml_mul_mat", &h.mul_mat},
      {"ggml_view_1d", &h.view_1d},
      {"ggml_get_name", &h.get_name},
      {"ggml_op_name", &h.op_name},
      {"ggml_type_name", &h.type_name},
      {"ggml_nbytes", &h.nbytes},
      {"ggml_tensor_overhead", &h.tensor_overhead},
      {"ggml_backend_reg_by_name", &h.reg_by_name},
      {"ggml_backend_reg_get_proc_address", &h.reg_get_proc_address},
      {"ggml_backend_reg_dev_get", &h.reg_dev_get},
      {"ggml_backend_dev_count", &h.dev_count},
      {"ggml_backend_dev_get", &h.dev_get},
      {"ggml_backend_dev_buffer_type", &h.dev_buffer_type},
      {"ggml_backend_dev_host_buffer_type", &h.dev_host_buffer_type},
      {"ggml_backend_load_all", &h.load_all},
      {"ggml_backend_buft_name", &h.buft_name},
      {"ggml_backend_buft_get_device", &h.buft_device},
      {"ggml_backend_cpu_buffer_from_ptr", &h.buffer_from_ptr},
      {"ggml_backend_buffer_free", &h.buffer_free},
      {"ggml_backend_tensor_set", &h.tensor_set},
      {"ggml_backend_tensor_alloc", &h.tensor_alloc},
      {"ggml_backend_buft_alloc_buffer", &h.buft_alloc},
      {"ggml_backend_buffer_get_base", &h.buffer_base},
      {"ggml_new_graph", &h.new_graph},
      {"ggml_build_forward_expand", &h.build_forward},
      {"ggml_backend_dev_init", &h.dev_init},
      {"ggml_backend_graph_compute", &h.graph_compute},
      {"ggml_backend_free", &h.backend_free},
      {"ggml_backend_dev_supports_op", &h.dev_supports_op},
  };
  static char missing[128];
  size_t found = 0;
  for (const Function &f : wanted) {
    void *address = dlsym(h.library, f.name);
    memcpy(f.address, &address, sizeof address);
    found += address != nullptr;
    if (!address) snprintf(missing, sizeof missing, "this ggml has no function %s", f.name);
  }
  const Function optional[] = {
      {"ggml_version", &h.version},
      {"ggml_new_tensor_3d", &h.new_tensor_3d},
      {"ggml_mul_mat_id", &h.mul_mat_id},
  };
  for (const Function &f : optional) {
    void *address = dlsym(h.library, f.name);
    memcpy(f.address, &address, sizeof address);
  }
  if (!found) return kHidden;
  return found < sizeof wanted / sizeof *wanted ? missing : nullptr;
}

/* The CPU backend may be one of several libraries, loaded with RTLD_LOCAL. Its registration leads
   to it. */
const char *find_cpu_backend(Host &h, bool load_backends) {
  h.cpu = h.reg_by_name("CPU");
  h.cpu_linked_in = h.cpu != nullptr;
  if (!h.cpu && load_backends) {
    h.load_all();
    h.cpu = h.reg_by_name("CPU");
  }
  if (!h.cpu) return "this ggml has loaded no CPU backend";
  if (h.cpu->api_version < 1 || h.cpu->api_version > kNewestVersion)
    return "this ggml has an interface version that we do not know";
  h.places = h.cpu->api_version < 3 ? kPlacesBefore3 : kPlaces3;
  void *getter = h.reg_get_proc_address(h.cpu, "ggml_backend_dev_get_extra_bufts");
  void *threads = h.reg_get_proc_address(h.cpu, "ggml_backend_set_n_threads");
  if (!getter) return "the CPU backend of this ggml has no list of buffer types";
  if (!threads) return "the number of threads of this ggml can't be set";
  h.extra_types_of = reinterpret_cast<BufferType **(*)(Device *)>(getter);
  h.set_threads = reinterpret_cast<void (*)(Backend *, int)>(threads);
  void *library = library_of(getter);
  void *list = dlsym(library, "_Z39ggml_backend_cpu_get_extra_buffer_typesv");
  void *barrier = dlsym(library, "ggml_barrier");
  if (!list) return "the CPU backend of this ggml hides its list of buffer types";
  if (!barrier) return "the CPU backend of this ggml hides its barrier";
  h.extra_types = &reinterpret_cast<std::vector<BufferType *> &(*)()>(list)();
  h.barrier = reinterpret_cast<void (*)(ThreadPool *)>(barrier);
  h.device = h.reg_dev_get(h.cpu, 0);
  return nullptr;
}

/* Make tensors with the host's functions, and compare their fields with abi.h. */
bool tensors_match(Host &h) {
  Context *context = h.init({size_t(1) << 16, nullptr, true});
  if (!context) return false;
  Tensor *a = h.new_tensor_2d(context, Q4_0, 256, 3), *b = h.new_tensor_2d(context, F32, 256, 5);
  Tensor *c = h.mul_mat(context, a, b), *v = h.view_1d(context, b, 32, 128);
  const auto offset_of = [](const void *to, const void *from) {
    return static_cast<size_t>(static_cast<const char *>(to) - static_cast<const char *>(from));
  };
  const size_t name = offset_of(h.get_name(a), a), size = offset_of(b, a) - kObjectHead;
  bool same = name == sizeof(Tensor) && size + kObjectHead == h.tensor_overhead() &&
              size > name + 16 && size < 4096;
  same = same && a->type == Q4_0 && a->ne[0] == 256 && a->ne[1] == 3 && a->ne[2] == 1 &&
         a->ne[3] == 1 && a->nb[0] == 18 && a->nb[1] == 144 && h.nbytes(a) == 432 && !a->buffer &&
         !a->data && !a->src[0] && !a->view_src && !a->flags;
  same = same && c->type == F32 && c->src[0] == a && c->src[1] == b && !c->src[2] &&
         c->ne[0] == 3 && c->ne[1] == 5 && !strcmp(h.op_name(c->op), "MUL_MAT");
  same = same && v->view_src == b && v->view_offs == 128 && !strcmp(h.op_name(v->op), "VIEW");
  if (same) {
    h.mul_mat_op = c->op;
    h.extra_offset = size - 16; /* the last 8 bytes are padding */
    const size_t length = h.extra_offset - name;
    same = length >= 64 && length <= 512 && (length & (length - 1)) == 0 && !h.tensor_extra(a);
  }
  h.free(context);
  return same;
}

/* Find the number of the products with experts, or -1: such products then stay with the host. */
int find_expert_op(const Host &h) {
  Context *context = h.new_tensor_3d && h.mul_mat_id ? h.init({size_t(1) << 16, nullptr, true}) : nullptr;
  if (!context) return -1;
  Tensor *w = h.new_tensor_3d(context, Q4_0, 256, 3, 4), *x = h.new_tensor_3d(context, F32, 256, 1, 5);
  Tensor *ids = h.new_tensor_2d(context, I32, 2, 5), *y = h.mul_mat_id(context, w, x, ids);
  const bool same = w->ne[2] == 4 && w->nb[2] == 3 * 144 && y->src[0] == w && y->src[1] == x &&
                    y->src[2] == ids && y->type == F32 && y->ne[0] == 3 && y->ne[1] == 2 &&
                    y->ne[2] == 5 && !strcmp(h.op_name(y->op), "MUL_MAT_ID");
  const int op = same ? y->op : -1;
  h.free(context);
  return op;
}

/* Make a buffer of known address and size, and find its type behind 9 or 11 functions. */
bool buffers_match(Host &h) {
  BufferType *plain = h.dev_buffer_type(h.device);
  if (!plain || plain->get_name(plain) != h.buft_name(plain)) return false;
  void *device = h.type_device(plain);
  if (device != h.buft_device(plain) || (device && device != h.device) || !h.is_host_type(plain))
    return false;
  alignas(64) static char memory[64];
  Buffer *buffer = h.buffer_from_ptr(memory, sizeof memory);
  if (!buffer) return false;
  h.buffer_words = 0;
  for (size_t words : {size_t(9), size_t(11)}) {
    void **w = h.words_of(buffer) + words;
    if (w[1] == memory && w[2] == reinterpret_cast<void *>(sizeof memory)) h.buffer_words = words;
  }
  const bool same =
      h.buffer_words && reinterpret_cast<BufferHead *>(buffer)->get_base(buffer) == memory;
  h.buffer_free(buffer);
  if (!same) return false;
  for (BufferType *extra : *h.extra_types)
    if (!extra || h.type_device(extra) != h.device || !h.type_context(extra)) return false;
  return true;
}

}  // namespace

bool Host::has_pinned_memory() const {
  for (size_t i = 0; i < dev_count(); i++)
    if (dev_get(i) != device && dev_host_buffer_type(dev_get(i))) return true;
  return false;
}

void *library_of(const void *address) {
  Dl_info info;
  void *found = nullptr;
  if (dladdr(address, &info) && info.dli_fname)
    found = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  return found ? found : dlopen(nullptr, RTLD_LAZY);
}

const char *find_host(Host &host, const void *caller, bool load_backends) {
  host.library = library_of(caller);
  if (const char *reason = find_functions(host)) return reason;
  if (const char *reason = find_cpu_backend(host, load_backends)) return reason;
  if (!tensors_match(host) || !buffers_match(host)) return kOtherStructures;
  host.mul_mat_id_op = find_expert_op(host);
  return nullptr;
}

}  // namespace sqft
