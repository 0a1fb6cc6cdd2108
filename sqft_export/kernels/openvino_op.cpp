// OpenVINO operators. Their weights are a Constant of bytes: a matrix in the format of matrix.h.
//   SqftMatMul  x [.., inputs] float32 times the matrix -> [.., rows] float32
//   SqftGather  rows of the matrix by ids [..] -> [.., inputs] float32: an embedding that shares
//               its matrix with the head
// They use the threads of the runtime's own arena.
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/op/op.hpp>
#include <openvino/openvino.hpp>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "mapped.h"

extern "C" {
#include "matrix.h"
}

namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kPiece = 32 * kHugePage;

// Allocate memory in huge pages if the system has them. Several matrices share a piece, because a
// huge page is several times the size of a small matrix. A piece is freed with its last matrix.
std::shared_ptr<uint8_t> allocate(size_t size) {
  static std::mutex mutex;
  static std::shared_ptr<uint8_t> piece;
  static size_t used = 0, whole = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  if (size > whole - used) {
    const size_t wanted = std::max(kPiece, (size + kHugePage - 1) / kHugePage * kHugePage);
    void *memory = nullptr;
    if (posix_memalign(&memory, kHugePage, wanted)) throw std::bad_alloc();
#if defined(__linux__)
    madvise(memory, wanted, MADV_HUGEPAGE);
#endif
    piece.reset(static_cast<uint8_t *>(memory), [](uint8_t *p) { free(p); });
    whole = wanted, used = 0;
  }
  std::shared_ptr<uint8_t> part(piece, piece.get() + used);
  used = std::min(whole, (used + size + 63) / 64 * 64);
  return part;
}

SqftMatrix *matrix_of(uint8_t *bytes) { return reinterpret_cast<SqftMatrix *>(bytes); }
const SqftMatrix *matrix_of(const uint8_t *bytes) {
  return reinterpret_cast<const SqftMatrix *>(bytes);
}

// Repack a matrix for another vector length.
std::shared_ptr<uint8_t> with_lanes(const SqftMatrix *m, uint32_t lanes) {
  const size_t groups = m->inputs / m->stored_group;
  std::vector<uint8_t> codes(size_t(m->rows) * m->inputs), zero(m->rows * groups);
  std::vector<uint16_t> scale(m->rows * groups);
  sqft_unpack(m, codes.data(), zero.data(), scale.data());
  std::vector<uint8_t> stored = codes;
  if (m->bits == 4) {
    stored.assign((codes.size() + 1) / 2, 0);
    for (size_t i = 0; i < codes.size(); i++) stored[i / 2] |= codes[i] << (i % 2 * 4);
  }
  const uint8_t *zeros = m->asymmetric ? zero.data() : nullptr;
  std::vector<uint32_t> kept(m->rows);
  sqft_count(stored.data(), m->bits, 0, zeros, m->rows, m->inputs, m->stored_group, kept.data());
  SqftMatrix plan = *m;
  plan.lanes = lanes;
  OPENVINO_ASSERT(!sqft_plan(&plan, kept.data()), "SqftMatMul: the matrix can't be laid out");
  auto out = allocate(plan.bytes);
  memcpy(out.get(), &plan, sizeof plan);
  auto *made = matrix_of(out.get());
  sqft_place(made, kept.data());
  sqft_pack(made, stored.data(), 0, zeros, scale.data(), 0, made->tiles);
  sqft_seal(made);
  return out;
}

// Return a Constant's bytes in the form that these kernels read fastest: in place, if a loader put
// them in huge pages with the right vector length; else a copy, which replaces them in memory.
std::shared_ptr<const uint8_t> prepared(const uint8_t *data, size_t size, uint32_t lanes) {
  const auto *m = matrix_of(data);
  OPENVINO_ASSERT(!sqft_check(m, size), "SqftMatMul: its weights are damaged");
  if (m->resident && m->lanes == lanes) return {data, [](const uint8_t *) {}};
  std::shared_ptr<uint8_t> copy;
  if (m->lanes == lanes) {
    copy = allocate(m->bytes);
    memcpy(copy.get(), data, m->bytes);
  } else {
    copy = with_lanes(m, lanes);
  }
  sqft::drop_mapped_pages(data, size);
  return copy;
}

// Return scratch memory that a thread keeps.
template <typename T>
T *scratch(std::vector<T> &of, size_t size) {
  if (of.size() < size) of.resize(size);
  return of.data();
}

class SqftMatMul : public ov::op::Op {
 public:
  OPENVINO_OP("SqftMatMul", "sqft_export");
  SqftMatMul() = default;
  SqftMatMul(const ov::OutputVector &inputs, int64_t rows, const std::string &activations)
      : Op(inputs), rows_(rows), activations_(activations) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    OPENVINO_ASSERT(get_input_size() == 2, "SqftMatMul takes two inputs");
    OPENVINO_ASSERT(activations_ == "int8" || activations_ == "f32",
                    "SqftMatMul: activations: found ", activations_, "; int8 or f32 is expected");
    const auto type = get_input_element_type(0);
    OPENVINO_ASSERT(type.is_dynamic() || type == ov::element::f32,
                    "SqftMatMul: activations of type ", type, "; f32 is expected");
    auto shape = get_input_partial_shape(0);
    if (shape.rank().is_static()) {
      OPENVINO_ASSERT(shape.size() >= 1, "SqftMatMul: a scalar can't be multiplied");
      shape[shape.size() - 1] = rows_;
    }
    set_output_type(0, ov::element::f32, shape);
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector &inputs) const override {
    return std::make_shared<SqftMatMul>(inputs, rows_, activations_);
  }

  bool visit_attributes(ov::AttributeVisitor &visitor) override {
    visitor.on_attribute("rows", rows_);
    visitor.on_attribute("activations", activations_);
    return true;
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector &out, const ov::TensorVector &in) const override {
    static const SqftKernels *const kernels = sqft_kernels(nullptr);
    OPENVINO_ASSERT(in.size() == 2 && in[0].get_element_type() == ov::element::f32,
                    "SqftMatMul: activations are not f32");
    const auto *stored = static_cast<const uint8_t *>(in[1].data());
    std::call_once(ready_->once, [&] {
      ready_->bytes = prepared(stored, in[1].get_byte_size(), kernels->lanes);
    });
    const auto *m = matrix_of(ready_->bytes.get());
    auto shape = in[0].get_shape();
    OPENVINO_ASSERT(!shape.empty() && shape.back() == m->inputs && rows_ == m->rows,
                    "SqftMatMul: the weights are of another shape");
    shape.back() = m->rows;
    out[0].set_shape(shape);
    const auto *x = static_cast<const float *>(in[0].data());
    auto *y = static_cast<float *>(out[0].data());
    const size_t tokens = in[0].get_size() / m->inputs;
    // Without isolation, a waiting thread could start work of another request, which uses the same
    // scratch memory of that thread.
    tbb::this_task_arena::isolate([&] {
      if (activations_ == "f32")
        over_tiles(m, [&](size_t first, size_t last) { sqft_exact(m, x, tokens, y, first, last); });
      else if (tokens)
        rounded(kernels, m, x, tokens, y);
    });
    return true;
  }

 private:
  struct Ready {
    std::once_flag once;
    std::shared_ptr<const uint8_t> bytes;
  };

  template <typename Part>
  static void over_tiles(const SqftMatrix *m, const Part &part) {
    const size_t tiles = m->tiles;
    const auto threads = std::max(1, tbb::this_task_arena::max_concurrency());
    const size_t parts = std::min<size_t>(tiles, static_cast<size_t>(threads));
    if (parts <= 1) return part(0, tiles);
    tbb::parallel_for(
        size_t(0), parts,
        [&](size_t i) { part(tiles * i / parts, tiles * (i + 1) / parts); },
        tbb::static_partitioner());
  }

  static void rounded(const SqftKernels *kernels, const SqftMatrix *m, const float *x,
                      size_t tokens, float *y) {
    static thread_local std::vector<int8_t> codes;
    static thread_local std::vector<float> scale;
    static thread_local std::vector<int32_t> sum;
    SqftInputs all{scratch(codes, sqft_code_bytes(m, tokens)), scratch(scale, tokens * m->groups),
                   scratch(sum, tokens * m->groups)};
    const auto round = [&](size_t t) { kernels->round(m, x + t * m->inputs, t, tokens, &all); };
    if (tokens < 8)
      for (size_t t = 0; t < tokens; t++) round(t);
    else
      tbb::parallel_for(size_t(0), tokens, round);
    over_tiles(m, [&](size_t first, size_t last) {
      if (tokens == 1) return kernels->one(m, &all, y, first, last);
      static thread_local std::vector<uint8_t> own;
      kernels->many(m, &all, tokens, y, first, last,
                    scratch(own, kernels->scratch_bytes(m, tokens)));
    });
  }

  int64_t rows_ = 0;
  std::string activations_ = "int8";
  std::shared_ptr<Ready> ready_ = std::make_shared<Ready>();
};

class SqftGather : public ov::op::Op {
 public:
  OPENVINO_OP("SqftGather", "sqft_export");
  SqftGather() = default;
  SqftGather(const ov::OutputVector &inputs, int64_t length) : Op(inputs), length_(length) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    OPENVINO_ASSERT(get_input_size() == 2, "SqftGather takes two inputs");
    auto shape = get_input_partial_shape(1);
    if (shape.rank().is_static()) shape.push_back(length_);
    set_output_type(0, ov::element::f32, shape);
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector &inputs) const override {
    return std::make_shared<SqftGather>(inputs, length_);
  }

  bool visit_attributes(ov::AttributeVisitor &visitor) override {
    visitor.on_attribute("length", length_);
    return true;
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector &out, const ov::TensorVector &in) const override {
    const auto *m = matrix_of(static_cast<const uint8_t *>(in[0].data()));
    std::call_once(*checked_, [&] {
      OPENVINO_ASSERT(!sqft_check(m, in[0].get_byte_size()), "SqftGather: its weights are damaged");
    });
    OPENVINO_ASSERT(length_ == m->inputs, "SqftGather: the weights are of another shape");
    auto shape = in[1].get_shape();
    shape.push_back(m->inputs);
    out[0].set_shape(shape);
    auto *y = static_cast<float *>(out[0].data());
    const bool wide = in[1].get_element_type() == ov::element::i64;
    OPENVINO_ASSERT(wide || in[1].get_element_type() == ov::element::i32,
                    "SqftGather: ids are neither i32 nor i64");
    const auto look_up = [&](size_t i) {
      const int64_t id = wide ? static_cast<const int64_t *>(in[1].data())[i]
                              : static_cast<const int32_t *>(in[1].data())[i];
      OPENVINO_ASSERT(id >= 0 && id < int64_t(m->rows), "SqftGather: there is no row ", id);
      sqft_row(m, static_cast<size_t>(id), y + i * m->inputs);
    };
    if (in[1].get_size() == 1)
      look_up(0);
    else
      tbb::parallel_for(size_t(0), in[1].get_size(), look_up);
    return true;
  }

 private:
  int64_t length_ = 0;
  std::shared_ptr<std::once_flag> checked_ = std::make_shared<std::once_flag>();
};

}  // namespace

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>(
    {std::make_shared<ov::OpExtension<SqftMatMul>>(),
     std::make_shared<ov::OpExtension<SqftGather>>()}));
