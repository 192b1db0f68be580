// What every program beside a device needs: current.json, the files that it names, an image's
// numbers, and what logits are worth. The formats are those of docs/packet.md, sections 6 to 8.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include <fcntl.h>
#include <nlohmann/json.hpp>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

namespace edge {

using Path = std::filesystem::path;
using Json = nlohmann::json;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// current.json and the file beside it are not of one update: it is being written.
struct Overtaken : Error {
  using Error::Error;
};

// A file that stays the same even if an update replaces it by a rename: it is opened once.
class File {
 public:
  explicit File(const Path& path) : name_(path), descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (descriptor_ < 0) throw Overtaken(name_.string() + " cannot be opened");
  }
  ~File() { ::close(descriptor_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // Another way to the same file, for a library that wants a path.
  std::string path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }

  std::string bytes() const {
    std::ifstream in(path(), std::ios::binary);
    if (!in) throw Error(name_.string() + " cannot be read");
    return {std::istreambuf_iterator<char>(in), {}};
  }

 private:
  Path name_;
  int descriptor_;
};

inline std::string sha256(const std::string& bytes) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int length = 0;
  if (!EVP_Digest(bytes.data(), bytes.size(), digest, &length, EVP_sha256(), nullptr))
    throw Error("SHA-256 failed");
  std::string text;
  for (unsigned int i = 0; i < length; ++i) {
    text += "0123456789abcdef"[digest[i] >> 4];
    text += "0123456789abcdef"[digest[i] & 15];
  }
  return text;
}

// The bundle that the device was flashed with: its lineage, and how an image becomes an input.
struct Bundle {
  std::string lineage;
  size_t size;
  float mean[3], std[3];

  explicit Bundle(const Path& folder) {
    const Json manifest = Json::parse(File(folder / "manifest.json").bytes());
    lineage = manifest.at("states").at(0);
    const Json& told = manifest.at("preprocessing");
    size = told.at("size");
    for (int c = 0; c < 3; ++c) {  // integers in units of 2^-24
      mean[c] = static_cast<float>(std::ldexp(told.at("mean").at(c).get<double>(), -24));
      std[c] = static_cast<float>(std::ldexp(told.at("std").at(c).get<double>(), -24));
    }
  }

  // RGB of size x size pixels, rows of columns of 3 bytes, to float32 (3, size, size).
  std::vector<float> input(const std::string& pixels) const {
    if (pixels.size() != 3 * size * size)
      throw Error("the image has " + std::to_string(pixels.size()) + " bytes: " +
                  std::to_string(3 * size * size) + " are needed, RGB of " + std::to_string(size) +
                  " x " + std::to_string(size) + " pixels");
    std::vector<float> found(pixels.size());
    for (size_t i = 0; i < size * size; ++i)
      for (int c = 0; c < 3; ++c) {
        const float value = static_cast<unsigned char>(pixels[3 * i + c]) / 255.0f;
        found[c * size * size + i] = (value - mean[c]) / std[c];
      }
    return found;
  }
};

struct Answer {
  std::string name;  // of the best class, even if the image is unknown
  double probability, score;
  bool known;
};

// current.json: what is in force, and what turns outputs into an answer.
class Current {
 public:
  Current(const Path& folder, const std::string& lineage) : folder_(folder) {
    const Json told = Json::parse(File(folder / "current.json").bytes());
    if (told.at("format") != "sdlora-edge/current/1")
      throw Error((folder / "current.json").string() + " has another format");
    if (told.at("lineage") != lineage)
      throw Error(folder.string() + " holds weights of another run: export them from a device of this bundle");
    task = told.at("task");
    files_ = told.at("files");
    confidence_ = told.at("confidence");
    for (const Json& name : told.at("classes")) {
      if (!name.is_null()) live_.push_back(names_.size());
      names_.push_back(name.is_null() ? "" : name.get<std::string>());
    }
  }

  // The file of weights, opened. It is certain to be the one that current.json describes.
  std::unique_ptr<File> weights() const {
    for (const auto& [name, digest] : files_.items()) {
      if (name == "model.pte") continue;  // the program, which is in the bundle too
      if (name.find('/') != std::string::npos) throw Error(name + " does not lie beside current.json");
      auto file = std::make_unique<File>(folder_ / name);
      if (sha256(file->bytes()) != digest)
        throw Overtaken((folder_ / name).string() +
                        " is not the file that current.json describes: export the weights again");
      return file;
    }
    throw Error("current.json names no file of weights");
  }

  // logits: one for each row. features: the model's second output, or null.
  Answer answer(const float* logits, size_t rows, const float* features, size_t width) const {
    if (rows < names_.size() || live_.empty()) throw Error("the model has another number of classes");
    std::vector<double> z;
    for (size_t row : live_) z.push_back(logits[row]);
    const size_t best = std::max_element(z.begin(), z.end()) - z.begin();
    const double temperature = confidence_.at("temperature");
    double sum = 0, score = z[best];
    for (double one : z) {
      if (!std::isfinite(one)) throw Error("the model computed outputs that are not finite");
      sum += std::exp((one - z[best]) / temperature);
    }
    const Json &weight = confidence_.at("weight"), &scale = confidence_.at("scale");
    for (size_t j = 0; j < weight.size(); ++j) {
      double part = 0;
      for (size_t c = 0; c < z.size(); ++c) part += weight[j][c].get<double>() * z[c];
      score -= std::pow(scale[j].get<double>() * part + confidence_.at("bias")[j].get<double>(), 2);
    }
    const Json &mean = confidence_.at("mean"), &precision = confidence_.at("precision");
    if (mean.size() > width) throw Error("the score needs the model's output `features`");
    for (size_t f = 0; f < mean.size(); ++f)
      score -= std::pow(precision[f].get<double>() * (features[f] - mean[f].get<double>()), 2);
    const Json& threshold = confidence_.at("threshold");
    const bool known = threshold.is_null() || score >= threshold.get<double>();
    return {names_[live_[best]], 1 / sum, score, known};
  }

  long task;

 private:
  Path folder_;
  Json files_, confidence_;
  std::vector<std::string> names_;
  std::vector<size_t> live_;  // rows that have a class
};

// What serves: a model with the weights that `current` describes.
struct Serving {
  virtual ~Serving() = default;
  virtual Answer answer(const std::vector<float>& input) = 0;
  std::unique_ptr<Current> current;
};

using Load = std::function<std::unique_ptr<Serving>(std::unique_ptr<Current>)>;

// Loads what is in force. An update may be written meanwhile: then it reads current.json again.
inline std::unique_ptr<Serving> load(const Bundle& bundle, const Path& folder, const Load& loader) {
  for (int tries = 1;; ++tries) try {
      return loader(std::make_unique<Current>(folder, bundle.lineage));
    } catch (const Overtaken&) {
      if (tries == 20) throw;
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
}

// A rename puts another file in the place of current.json. To notice it costs one system call.
inline std::tuple<ino_t, time_t, long> version(const Path& folder) {
  struct stat found {};
  ::stat((folder / "current.json").c_str(), &found);
  return {found.st_ino, found.st_mtim.tv_sec, found.st_mtim.tv_nsec};
}

// Answers each file that standard input names, one a line. Takes over an update between two images.
inline int serve(const Path& bundle_folder, const Path& folder, const Load& loader) try {
  const Bundle bundle(bundle_folder);
  auto seen = version(folder);
  auto serving = load(bundle, folder, loader);
  for (std::string line; std::getline(std::cin, line);) try {
      if (const auto now = version(folder); now != seen) {
        seen = now;
        try {
          serving = load(bundle, folder, loader);
        } catch (const std::exception& error) {  // the weights before it go on serving
          std::cerr << "not updated: " << error.what() << std::endl;
        }
      }
      const Answer found = serving->answer(bundle.input(File(line).bytes()));
      std::cout << Json{{"image", line},       {"class", found.name},   {"probability", found.probability},
                        {"known", found.known}, {"score", found.score}, {"task", serving->current->task}}
                << std::endl;
    } catch (const std::exception& error) {
      std::cout << Json{{"image", line}, {"error", error.what()}} << std::endl;
    }
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << std::endl;
  return 1;
}

}  // namespace edge
