/* The parts of ggml's binary interface that the plug-in uses, declared here: building it needs no
   header of llama.cpp. host.cpp compares every part with objects that the host itself makes. */
#pragma once
#include <cstddef>
#include <cstdint>

namespace ggml_abi {

struct Buffer;
struct BufferType;
struct Device;
struct Context;
struct ThreadPool;

/* Numbers of the GGUF format, which never change. */
enum Type : int32_t { F32 = 0, Q4_0 = 2, Q4_1 = 3, Q8_0 = 8, I32 = 26 };

/* ggml_tensor up to `data`. A name follows, whose length differs between builds, then `extra`. */
struct Tensor {
  int32_t type;
  Buffer *buffer;
  int64_t ne[4];
  size_t nb[4];
  int32_t op;
  int32_t op_params[16];
  int32_t flags;
  Tensor *src[10];
  Tensor *view_src;
  size_t view_offs;
  void *data;
};

/* The first functions of a buffer type. TypePlaces has the others. */
struct BufferType {
  const char *(*get_name)(BufferType *);
  Buffer *(*alloc_buffer)(BufferType *, size_t);
};

/* Where a buffer type has its other fields, in pointers; its context follows its device. Version 3
   of the interface has two more functions for lists of tensors. */
struct TypePlaces {
  size_t alignment, is_host, device;
};
constexpr TypePlaces kPlacesBefore3 = {2, 5, 6}, kPlaces3 = {3, 7, 8};
constexpr size_t kTypeWords = kPlaces3.device + 2;
constexpr int kNewestVersion = 3;

/* The first functions of a buffer. More follow, the last but one is `clear`; then type, context
   and size. Version 2 of the interface has two more functions than version 1. */
struct BufferHead {
  void (*free_buffer)(Buffer *);
  void *(*get_base)(Buffer *);
  int (*init_tensor)(Buffer *, Tensor *);
  void (*memset_tensor)(Buffer *, Tensor *, uint8_t, size_t, size_t);
  void (*set_tensor)(Buffer *, Tensor *, const void *, size_t, size_t);
  void (*get_tensor)(Buffer *, const Tensor *, void *, size_t, size_t);
};

struct Registration {
  int api_version;
  const char *(*get_name)(Registration *);
  size_t (*get_device_count)(Registration *);
  Device *(*get_device)(Registration *, size_t);
  void *(*get_proc_address)(Registration *, const char *);
  void *context;
};

struct InitParams {
  size_t mem_size;
  void *mem_buffer;
  bool no_alloc;
};

struct ComputeParams {
  int ith, nth;
  size_t wsize;
  void *wdata;
  ThreadPool *threadpool;
};

/* The virtual functions of ggml::cpu::tensor_traits and ggml::cpu::extra_buffer_type, in order. */
struct Traits {
  virtual ~Traits() = default;
  virtual bool work_size(int threads, const Tensor *op, size_t &size) = 0;
  virtual bool compute_forward(ComputeParams *params, Tensor *op) = 0;
};

struct ExtraBufferType {
  virtual ~ExtraBufferType() = default;
  virtual bool supports_op(Device *device, const Tensor *op) = 0;
  virtual Traits *get_tensor_traits(const Tensor *op) = 0;
};

}  // namespace ggml_abi
