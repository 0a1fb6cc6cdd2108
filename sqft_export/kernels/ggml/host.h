/* The ggml that loaded the plug-in: its functions, and the places of the fields that differ between
   builds. */
#pragma once
#include <vector>

#include "abi.h"

namespace sqft {

using namespace ggml_abi;

struct Graph;
struct Backend;

struct Host {
  /* functions of libggml and libggml-base */
  Context *(*init)(InitParams);
  void (*free)(Context *);
  Tensor *(*new_tensor_2d)(Context *, int, int64_t, int64_t);
  Tensor *(*mul_mat)(Context *, Tensor *, Tensor *);
  Tensor *(*view_1d)(Context *, Tensor *, int64_t, size_t);
  const char *(*get_name)(const Tensor *);
  const char *(*op_name)(int);
  const char *(*type_name)(int);
  size_t (*nbytes)(const Tensor *);
  size_t (*tensor_overhead)();
  Registration *(*reg_by_name)(const char *);
  void *(*reg_get_proc_address)(Registration *, const char *);
  Device *(*reg_dev_get)(Registration *, size_t);
  size_t (*dev_count)();
  Device *(*dev_get)(size_t);
  BufferType *(*dev_buffer_type)(Device *);
  BufferType *(*dev_host_buffer_type)(Device *);
  void (*load_all)();
  const char *(*buft_name)(BufferType *);
  Device *(*buft_device)(BufferType *);
  Buffer *(*buffer_from_ptr)(void *, size_t);
  void (*buffer_free)(Buffer *);
  void (*tensor_set)(Tensor *, const void *, size_t, size_t);
  int (*tensor_alloc)(Buffer *, Tensor *, void *);
  Buffer *(*buft_alloc)(BufferType *, size_t);
  void *(*buffer_base)(Buffer *);
  Graph *(*new_graph)(Context *);
  void (*build_forward)(Graph *, Tensor *);
  Backend *(*dev_init)(Device *, const char *);
  int (*graph_compute)(Backend *, Graph *);
  void (*backend_free)(Backend *);
  bool (*dev_supports_op)(Device *, const Tensor *);
  const char *(*version)(); /* may be null */
  /* for experts; both may be null */
  Tensor *(*new_tensor_3d)(Context *, int, int64_t, int64_t, int64_t);
  Tensor *(*mul_mat_id)(Context *, Tensor *, Tensor *, Tensor *);
  /* functions and variables of the CPU backend's library */
  BufferType **(*extra_types_of)(Device *);
  void (*set_threads)(Backend *, int);
  void (*barrier)(ThreadPool *);
  std::vector<BufferType *> *extra_types;
  /* found by inspecting objects that the host made */
  void *library;
  Registration *cpu;
  Device *device;
  size_t extra_offset; /* of Tensor::extra */
  size_t buffer_words; /* pointers before the type of a buffer */
  TypePlaces places;
  int mul_mat_op, mul_mat_id_op; /* -1: this host has no experts */
  bool cpu_linked_in; /* registered without loading backends */

  void *&tensor_extra(Tensor *t) const {
    return *reinterpret_cast<void **>(reinterpret_cast<char *>(t) + extra_offset);
  }
  void *tensor_extra(const Tensor *t) const { return tensor_extra(const_cast<Tensor *>(t)); }
  void **words_of(Buffer *b) const { return reinterpret_cast<void **>(b); }
  BufferType *&type_of(Buffer *b) const {
    return *reinterpret_cast<BufferType **>(words_of(b) + buffer_words);
  }
  void *&context_of(Buffer *b) const { return words_of(b)[buffer_words + 1]; }
  void *&type_word(BufferType *t, size_t place) const {
    return reinterpret_cast<void **>(t)[place];
  }
  void *&type_device(BufferType *t) const { return type_word(t, places.device); }
  void *&type_context(BufferType *t) const { return type_word(t, places.device + 1); }
  bool is_host_type(BufferType *t) const {
    const auto is_host = reinterpret_cast<bool (*)(BufferType *)>(type_word(t, places.is_host));
    return is_host && is_host(t);
  }
  /* Whether llama.cpp offers weights to a GPU's pinned memory before it offers them to us. */
  bool has_pinned_memory() const;
};

/* Return the handle of the library that contains an address; of the program itself if there is
   none. */
void *library_of(const void *address);

/* Fill in the functions and structures of the ggml in which `caller` lies. Returns null, or why
   this ggml is not supported.
   load_backends: load the CPU backend if it is a separate library. */
const char *find_host(Host &host, const void *caller, bool load_backends);

}  // namespace sqft
