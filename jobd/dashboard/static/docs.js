// Shows the OpenAPI document that the page names. Tokens entered here are not stored.
"use strict";

// swagger-ui has a class for dark colours. Follow the preference of the system, as all pages do.
const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", follow);
follow();

// The headings of swagger-ui skip the second level.
const container = document.getElementById("swagger-ui");
const fixLevels = () => {
  for (const heading of container.querySelectorAll("h3, h4, h5")) heading.setAttribute("aria-level", String(heading.tagName[1] - 1));
};
new MutationObserver(fixLevels).observe(container, { childList: true, subtree: true });

const documentUrl = container.dataset.document;

SwaggerUIBundle({
  url: documentUrl,
  dom_id: "#swagger-ui",
  deepLinking: true,
  persistAuthorization: false,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  validatorUrl: null,
  syntaxHighlight: { activated: false },
  ...(documentUrl === "/openapi.json" ? {} : { supportedSubmitMethods: [] }), // the worker socket, which browsers cannot reach
});
