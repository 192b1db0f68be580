// Runs a bundle's model.onnx with the adapter that `sdlora-edge device export-weights` wrote.
//
//     onnx_device BUNDLE FOLDER < names-of-images
//
// FOLDER holds the adapter and current.json.
#include <cstdlib>

#include <onnxruntime_cxx_api.h>

#include "../edge.hpp"

namespace {

class Model : public edge::Serving {
 public:
  Model(Ort::Session& session, size_t size, std::unique_ptr<edge::Current> now) : session_(session), size_(size) {
    current = std::move(now);
    const std::string bytes = current->weights()->bytes();
    adapter_ = Ort::LoraAdapter::CreateLoraAdapterFromArray(bytes.data(), bytes.size(), nullptr);
    run_.AddActiveLoraAdapter(adapter_);
  }

  edge::Answer answer(const std::vector<float>& input) override {
    const int64_t shape[] = {1, 3, static_cast<int64_t>(size_), static_cast<int64_t>(size_)};
    const auto cpu = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto image = Ort::Value::CreateTensor<float>(cpu, const_cast<float*>(input.data()), input.size(), shape, 4);
    const char *inputs[] = {"pictures"}, *outputs[] = {"logits", "features"};
    auto found = session_.Run(run_, inputs, &image, 1, outputs, session_.GetOutputCount());
    const auto length = [&](size_t i) { return found[i].GetTensorTypeAndShapeInfo().GetElementCount(); };
    const bool told = found.size() > 1;
    return current->answer(found[0].GetTensorData<float>(), length(0),
                           told ? found[1].GetTensorData<float>() : nullptr, told ? length(1) : 0);
  }

 private:
  Ort::Session& session_;
  size_t size_;
  Ort::LoraAdapter adapter_{nullptr};
  Ort::RunOptions run_;
};

}  // namespace

int main(int count, char** words) {
  if (count != 3) return std::cerr << "usage: onnx_device BUNDLE FOLDER < names-of-images\n", 2;
  // The library's wheels send telemetry unless this is set before it starts.
  ::setenv("ORT_DISABLE_TELEMETRY", "1", 0);
  try {
    const edge::Path bundle = words[1];
    Ort::Env env(ORT_LOGGING_LEVEL_ERROR);
    Ort::SessionOptions options;
    // Otherwise an int8 bundle would round activations too.
    options.AddConfigEntry("session.disable_quant_qdq", "1");
    // ONNX Runtime 1.23 to 1.29 crash with ORT_ENABLE_ALL if weights are float16 (docs/platforms.md).
    options.SetGraphOptimizationLevel(ORT_ENABLE_EXTENDED);
    Ort::Session session(env, (bundle / "model.onnx").c_str(), options);
    const size_t size = edge::Bundle(bundle).size;
    return edge::serve(bundle, words[2], [&](std::unique_ptr<edge::Current> now) {
      return std::make_unique<Model>(session, size, std::move(now));
    });
  } catch (const std::exception& error) {
    return std::cerr << "error: " << error.what() << std::endl, 1;
  }
}
