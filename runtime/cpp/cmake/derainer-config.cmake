# derainer::core (bundles, image contract, tiles) is always here; derainer::derainer where it was built with TensorRT.
include(${CMAKE_CURRENT_LIST_DIR}/derainer-targets.cmake)
if(NOT TARGET derainer::derainer)
  message(STATUS "derainer was built without TensorRT: there is derainer::core, but no derainer::derainer")
endif()
