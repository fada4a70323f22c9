# Finds CUDA and the library that DERAINER_FLAVOR names. Sets DERAINER_ENGINE to whether both are installed, and then
# makes the target derainer_tensorrt.
#
# The SDK is looked for where TENSORRT_ROOT or TENSORRT_RTX_ROOT says, where the vendor's CMake package is, and in the
# system's folders. TENSORRT_INCLUDE_DIR and TENSORRT_LIBRARY, or those of TENSORRT_RTX, may be given instead, since the
# packages on PyPI have libraries without headers, and without the names that a linker looks for.

set(DERAINER_ENGINE OFF)
if(DERAINER_FLAVOR STREQUAL "tensorrt")
  set(title "TensorRT")
  set(vendor TensorRT-Enterprise)
  set(prefix TENSORRT)
  set(name nvinfer)
elseif(DERAINER_FLAVOR STREQUAL "rtx")
  set(title "TensorRT for RTX")
  set(vendor TensorRT-RTX)
  set(prefix TENSORRT_RTX)
  set(name tensorrt_rtx)
else()
  message(FATAL_ERROR "DERAINER_FLAVOR: expected tensorrt or rtx, found ${DERAINER_FLAVOR}")
endif()

find_package(CUDAToolkit QUIET)
find_package(${vendor} CONFIG QUIET HINTS "${${prefix}_ROOT}")
set(hints ${${prefix}_ROOT})
if(${vendor}_FOUND)
  list(APPEND hints ${${vendor}_DIR}/../../.. ${${vendor}_DIR}/../..)
endif()
find_path(${prefix}_INCLUDE_DIR NvInfer.h HINTS ${hints} PATH_SUFFIXES include)
find_library(${prefix}_LIBRARY ${name} HINTS ${hints} PATH_SUFFIXES lib lib64)

set(missing "")
if(NOT CUDAToolkit_FOUND)
  string(APPEND missing "\n  CUDA's headers and runtime: install the toolkit, or set CUDAToolkit_ROOT")
endif()
if(NOT ${prefix}_INCLUDE_DIR)
  string(APPEND missing "\n  NvInfer.h of ${title}: install its SDK and set ${prefix}_ROOT, or ${prefix}_INCLUDE_DIR")
endif()
if(NOT ${prefix}_LIBRARY)
  string(APPEND missing "\n  lib${name}.so: install the SDK of ${title} and set ${prefix}_ROOT, or ${prefix}_LIBRARY")
endif()
if(missing)
  message(WARNING "Only the core (bundles, image contract, tiles) and derainer-info are built, not the library. "
                  "Missing:${missing}")
  return()
endif()

message(STATUS "${title}: ${${prefix}_INCLUDE_DIR}, ${${prefix}_LIBRARY}; CUDA ${CUDAToolkit_VERSION}")
set(DERAINER_ENGINE ON)
add_library(derainer_tensorrt INTERFACE)
target_include_directories(derainer_tensorrt SYSTEM INTERFACE ${${prefix}_INCLUDE_DIR})
target_link_libraries(derainer_tensorrt INTERFACE ${${prefix}_LIBRARY} CUDA::cudart)
