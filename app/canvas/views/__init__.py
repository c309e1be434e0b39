"""The pages. (In a folder called `pages` Streamlit would find them by itself, and add its own navigation.)"""
