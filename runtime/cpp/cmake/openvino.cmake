# Finds OpenVINO, unless DERAINER_OPENVINO is OFF. Makes the target derainer_openvino, the backend, which is without it
# the file that says so; `openvino_missing` says what is not there.

set(openvino_missing "")
if(NOT DERAINER_OPENVINO)
  set(openvino_missing "\n  OpenVINO: DERAINER_OPENVINO is OFF")
else()
  find_package(OpenVINO QUIET CONFIG COMPONENTS Runtime)
  if(NOT OpenVINO_FOUND)
    set(openvino_missing "\n  OpenVINO's CMake package: pip install openvino, and set OpenVINO_DIR to what its "
                         "openvino.utils.get_cmake_path() tells, or install OpenVINO's packages")
    string(CONCAT openvino_missing ${openvino_missing})
  endif()
endif()

if(openvino_missing)
  add_library(derainer_openvino OBJECT no_openvino.cpp)
else()
  message(STATUS "OpenVINO ${OpenVINO_VERSION}: ${OpenVINO_DIR}")
  add_library(derainer_openvino OBJECT openvino.cpp)
  target_link_libraries(derainer_openvino PUBLIC openvino::runtime)
endif()
target_link_libraries(derainer_openvino PUBLIC derainer_core)
