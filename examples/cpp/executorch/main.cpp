// Runs a bundle's model.pte with the .ptd that a device keeps in STORE/engine, or that
// `sdlora-edge device export-weights --format ptd` wrote.
//
//     executorch_device BUNDLE FOLDER < names-of-images
//
// FOLDER holds the .ptd and current.json.
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include "../edge.hpp"

namespace {

using executorch::extension::make_tensor_ptr;
using executorch::extension::Module;

// Not thread-safe: use one for each thread, or a lock.
class Model : public edge::Serving {
 public:
  Model(const edge::Path& program, int size, std::unique_ptr<edge::Current> now)
      : size_(size), weights_(now->weights()), module_(program, std::vector<std::string>{weights_->path()}) {
    current = std::move(now);
    if (module_.load_forward() != executorch::runtime::Error::Ok)
      throw edge::Error(program.string() + " cannot be loaded with its weights");
  }

  edge::Answer answer(const std::vector<float>& input) override {
    auto image = make_tensor_ptr({1, 3, size_, size_}, const_cast<float*>(input.data()));
    const auto found = module_.forward(image);
    if (!found.ok()) throw edge::Error("the model failed");
    const auto logits = found->at(0).toTensor();  // a row without a class holds about -1e30
    const bool told = found->size() > 1;
    const auto features = told ? found->at(1).toTensor() : logits;
    return current->answer(logits.const_data_ptr<float>(), logits.numel(),
                           features.const_data_ptr<float>(), told ? features.numel() : 0);
  }

 private:
  int size_;
  std::unique_ptr<edge::File> weights_;
  Module module_;
};

}  // namespace

int main(int count, char** words) {
  if (count != 3) return std::cerr << "usage: executorch_device BUNDLE FOLDER < names-of-images\n", 2;
  try {
    const edge::Path bundle = words[1];
    const int size = static_cast<int>(edge::Bundle(bundle).size);
    return edge::serve(bundle, words[2], [&](std::unique_ptr<edge::Current> now) {
      return std::make_unique<Model>(bundle / "model.pte", size, std::move(now));
    });
  } catch (const std::exception& error) {
    return std::cerr << "error: " << error.what() << std::endl, 1;
  }
}
