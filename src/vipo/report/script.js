(function () {
  "use strict";
  // Slider over the sheets: without it (no script, print) every iteration is shown.
  var sheets = document.querySelector(".sheets");
  if (sheets) {
    var steps = sheets.querySelectorAll(".step");
    var range = sheets.querySelector("input");
    var output = sheets.querySelector("output");
    var show = function () {
      steps.forEach(function (step, index) { step.classList.toggle("away", index !== Number(range.value)); });
      output.textContent = steps[range.value].dataset.iteration;
      range.setAttribute("aria-valuetext", "Iteration " + steps[range.value].dataset.iteration);
    };
    if (steps.length > 1) {
      sheets.querySelector(".slider").hidden = false;
      sheets.classList.add("sliding");
      range.addEventListener("input", show);
      show();
    }
  }
  // Enlarge an image.
  var dialog = document.querySelector("dialog");
  if (dialog && dialog.showModal) {
    document.querySelectorAll(".zoom").forEach(function (button) {
      button.addEventListener("click", function () {
        var image = button.querySelector("img");
        var large = dialog.querySelector("img");
        large.src = image.currentSrc || image.src;
        large.alt = image.alt;
        large.className = button.classList.contains("pixel") ? "pixel" : "";
        dialog.querySelector("p").textContent = image.alt;
        dialog.showModal();
      });
    });
    dialog.addEventListener("click", function (event) { if (event.target === dialog) { dialog.close(); } });
  }
  // Copy the command.
  var copy = document.querySelector(".copy");
  if (copy && navigator.clipboard) {
    copy.hidden = false;
    copy.addEventListener("click", function () {
      navigator.clipboard.writeText(copy.previousElementSibling.textContent).then(function () {
        copy.textContent = "Copied";
      });
    });
  }
})();
